"""How many messages a rank may leave unread before it waits: few, so that what is sent need not be held for a whole step.

A sent tensor has to be kept until the receiver has it. Waiting for that at every send could deadlock, where stages go round
in a ring; never waiting would hold all outputs of an evaluation. The right number can be read off the schedule.
"""

from __future__ import annotations

from functools import lru_cache

from fstep.grad.schedule import Action, Schedule


@lru_cache(maxsize=64)
def send_window(schedule: Schedule) -> int:
    """Return the smallest number of unread messages, 2 or more, with which every rank gets to the end of its row."""
    window = 2
    while not _finishes(schedule, window):
        window += 1
    return window


def _finishes(schedule: Schedule, window: int) -> bool:
    """Run the table with ranks that wait, before they send, until at most ``window - 1`` of their messages are unread."""
    done: set[Action] = set()
    read: set[Action] = set()  # messages, by the action that sent them
    sent: list[list[Action]] = [[] for _ in schedule.actions]
    at = [0] * len(schedule.actions)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while at[rank] < len(row):
                a = row[at[rank]]
                needs = schedule.needs(a)
                if not all(b in done for b in needs):
                    break
                read.update(b for b in needs if schedule.rank_of[b.stage] != rank)
                if _sends(schedule, a, rank):
                    if len(sent[rank]) >= window and sent[rank][-window] not in read:
                        break
                    sent[rank].append(a)
                done.add(a)
                at[rank] += 1
                moved = True
    return all(i == len(row) for i, row in zip(at, schedule.actions, strict=True))


def _sends(schedule: Schedule, a: Action, rank: int) -> bool:
    to = a.stage + {"F": 1, "B": -1, "I": -1, "W": 0}[a.kind]
    return a.kind != "W" and 0 <= to < schedule.stages and schedule.rank_of[to] != rank
