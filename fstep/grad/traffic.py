"""When a rank receives and when it lets go of what it sent, read off the schedule's own timeline.

    sender      F0 |  F1 |  F2 |  ...        a message is there when its action ends
    receiver        F0 |  B0    |  F1 |      it is received at the next change of actions, while something else computes

A message that is received only when it is needed makes the computation wait for the transfer, and meanwhile its sender's
device is busy offering it. One that is received long before it comes keeps the receiver's device busy waiting. What is sent
has to be kept until the receiver has it: never waiting for that would hold all outputs of an evaluation, and waiting for
all of it could deadlock, where stages go round in a ring. Every wait here is for something that happens earlier in the
timeline, so that nobody ever waits in a circle.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fstep.grad.schedule import Action, Schedule

Link = tuple[str, int, int]  # "forward" or "backward", from rank, to rank


class Change(NamedTuple):
    """Before an action: for which of its actions a rank receives, and of which of them others have the message by now."""

    receive: tuple[Action, ...]
    release: tuple[Action, ...]


@lru_cache(maxsize=64)
def traffic(schedule: Schedule) -> tuple[tuple[Change, ...], ...]:
    """Return what each rank does before each of its actions."""
    timeline = schedule.timeline()
    start = {span.action: span.start for row in timeline for span in row}
    end = {span.action: span.end for row in timeline for span in row}
    coming: list[list[tuple[float, Action]]] = [[] for _ in timeline]  # to each rank: when it is there, for what
    taken: list[list[tuple[float, Action]]] = [[] for _ in timeline]  # from each rank: when it is used, of what
    for rank, row in enumerate(schedule.actions):
        for a in row:
            for b in schedule.needs(a):
                if (src := schedule.rank_of[b.stage]) != rank:
                    coming[rank].append((end[b], a))
                    taken[src].append((start[a], b))
    return tuple(_changes([s.start for s in row], sorted(coming[r]), sorted(taken[r])) for r, row in enumerate(timeline))


def _changes(
    starts: list[float], coming: list[tuple[float, Action]], taken: list[tuple[float, Action]]
) -> tuple[Change, ...]:
    out, before = [], float("-inf")
    for now in starts:
        receive = tuple(a for when, a in coming if before < when <= now)
        release = tuple(b for when, b in taken if before <= when < now)
        out.append(Change(receive, release))
        before = now
    return tuple(out)


@lru_cache(maxsize=64)
def links(schedule: Schedule) -> tuple[Link, ...]:
    """Return who sends to whom, in an order that is the same for all."""
    found = set()
    for rank, row in enumerate(schedule.actions):
        for a in row:
            for b in schedule.needs(a):
                if (src := schedule.rank_of[b.stage]) != rank:
                    found.add(("forward" if a.kind == "F" else "backward", src, rank))
    return tuple(sorted(found))
