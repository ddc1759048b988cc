"""When ranks receive, and when they let go of what they sent: read off a table, and run by ranks that know nothing else."""

from __future__ import annotations

import pytest

import fstep
from fstep import Action, Schedule
from fstep.grad.by_name import NAMED
from fstep.grad.traffic import links, traffic

TABLES = [
    (name, ranks, number)
    for name in NAMED
    for ranks in (1, 2, 3, 4, 8)
    for number in (1, 3, ranks, 2 * ranks, 4 * ranks + 1)
    if not (name == "dualpipev" and number < 2 * ranks)
]


def producer(schedule: Schedule, a: Action) -> Action | None:
    """What another rank sends for an action."""
    return next((b for b in schedule.needs(a) if schedule.rank_of[b.stage] != schedule.rank_of[a.stage]), None)


def consumers(schedule: Schedule) -> dict[Action, Action]:
    """For each action whose result is sent, the action that needs it."""
    found = {producer(schedule, a): a for row in schedule.actions for a in row}
    return {b: a for b, a in found.items() if b is not None}


def most_held(schedule: Schedule) -> int:
    """How many messages a rank has sent and not let go of, at most."""
    used, most = consumers(schedule), 0
    for row, changes in zip(schedule.actions, traffic(schedule), strict=True):
        held = 0
        for a, change in zip(row, changes, strict=True):
            held += (a in used) - len(change.release)
            most = max(most, held)
    return most


def both_ways(name: str, ranks: int, number: int) -> list[Schedule]:
    table = NAMED[name](ranks, number)
    return [table, table.forward_only()]


@pytest.mark.parametrize(("name", "ranks", "number"), TABLES)
def test_everything_is_received_once_in_the_order_of_sending_before_it_is_used(name: str, ranks: int, number: int) -> None:
    for table in both_ways(name, ranks, number):
        used = consumers(table)

        def link(b: Action, table: Schedule = table, used: dict[Action, Action] = used) -> tuple[int, int, bool]:
            return table.rank_of[b.stage], table.rank_of[used[b].stage], b.kind == "F"

        sent: dict[tuple, list[Action]] = {}
        for b in (b for row in table.actions for b in row if b in used):
            sent.setdefault(link(b), []).append(used[b])
        received: dict[tuple, list[Action]] = {}
        for row, changes in zip(table.actions, traffic(table), strict=True):
            there: set[Action] = set()
            for a, change in zip(row, changes, strict=True):
                for coming in change.receive:
                    sender = producer(table, coming)
                    assert sender is not None and coming not in there
                    received.setdefault(link(sender), []).append(coming)
                there |= set(change.receive)
                assert producer(table, a) is None or a in there
        assert received == sent


@pytest.mark.parametrize(("name", "ranks", "number"), TABLES)
def test_ranks_that_wait_for_all_of_it_get_to_the_end(name: str, ranks: int, number: int) -> None:
    """Each rank stops at a change of actions until what it is to receive was sent, and what it lets go of was used."""
    for table in both_ways(name, ranks, number):
        used = consumers(table)
        sent: set[Action] = set()
        begun: set[Action] = set()
        at = [0] * ranks
        moved = True
        while moved:
            moved = False
            for rank, (row, changes) in enumerate(zip(table.actions, traffic(table), strict=True)):
                while at[rank] < len(row):
                    a, change = row[at[rank]], changes[at[rank]]
                    assert all(b in sent and table.rank_of[b.stage] == rank for b in change.release), "not sent yet"
                    if not all(used[b] in begun for b in change.release):
                        break
                    if not all(producer(table, b) in sent for b in change.receive):
                        break
                    begun.add(a)
                    sent.add(a)
                    at[rank] += 1
                    moved = True
        assert at == [len(row) for row in table.actions]
        released = [b for changes in traffic(table) for change in changes for b in change.release]
        assert len(set(released)) == len(released)


def test_a_message_is_received_while_something_else_computes() -> None:
    """1f1b: rank 1 gets microbatch 3 before its first backward pass, and uses it after."""
    table = fstep.one_f_one_b(4, 8)
    row, changes = table.actions[1], traffic(table)[1]
    early = {a: next(b for b, c in zip(row, changes, strict=True) if a in c.receive) for a in row if a.kind == "F"}
    assert early[Action("F", 1, 3)] == Action("B", 1, 0)
    assert early[Action("F", 1, 0)] == Action("F", 1, 0)


def test_links() -> None:
    assert links(fstep.zbv(2, 2)) == (("backward", 0, 1), ("backward", 1, 0), ("forward", 0, 1), ("forward", 1, 0))
    assert links(fstep.one_f_one_b(3, 4).forward_only()) == (("forward", 0, 1), ("forward", 1, 2))
