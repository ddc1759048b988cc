"""From what a caller passes as ``schedule=`` to a table: a name, a function of ranks and microbatches, or a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from fstep.grad.schedule import Schedule
from fstep.grad.schedules import dualpipev, gpipe, interleaved, interleaved_zero_bubble, one_f_one_b, zbv
from fstep.tree import check_type

MakeSchedule = Callable[[int, int], Schedule]
ScheduleLike = str | Schedule | MakeSchedule
NAMED: dict[str, MakeSchedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "interleaved_zero_bubble": interleaved_zero_bubble,
    "zbv": zbv,
    "dualpipev": dualpipev,
}


# The same stages on the same ranks, for any number of microbatches: what an evaluation runs.
FORWARD: dict[str, MakeSchedule] = {**NAMED, "dualpipev": zbv}


def schedule_for(function: str, schedule: ScheduleLike, ranks: int, microbatches: int, *, forward: bool = False) -> Schedule:
    """Return the table for so many ranks and microbatches, with or without backward passes, or say why there is none."""
    if callable(schedule) and not isinstance(schedule, Schedule):
        # One of ours is as good as its name, under which its tables are kept.
        schedule = next((name for name, make in NAMED.items() if make is schedule), schedule)
    if isinstance(schedule, str):
        if schedule not in NAMED:
            raise ValueError(
                f"{function}: schedule {schedule!r} is unknown; pass one of {', '.join(NAMED)}, a Schedule, or a function "
                "that makes one from the numbers of ranks and of microbatches"
            )
        return _made(schedule, ranks, microbatches, forward)
    if callable(schedule) and not isinstance(schedule, Schedule):
        made = schedule(ranks, microbatches)
        check_type(function, "what schedule returned", made, Schedule, "a function that returns a Schedule")
        schedule = made
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{function}: schedule is a {type(schedule).__name__}; pass a name, a Schedule or a function")
    if (len(schedule.actions), schedule.microbatches) != (ranks, microbatches):
        raise ValueError(
            f"{function}: schedule {schedule.name!r} is for {len(schedule.actions)} ranks and {schedule.microbatches} "
            f"microbatches, and there are {ranks} and {microbatches}; make it for these"
        )
    return schedule.forward_only() if forward else schedule


@lru_cache(maxsize=64)
def _made(name: str, ranks: int, microbatches: int, forward: bool) -> Schedule:
    # Making and checking a table takes milliseconds, and every step asks for the same one.
    if forward:
        return FORWARD[name](ranks, microbatches).forward_only()
    return NAMED[name](ranks, microbatches)


def stage_ranks(schedule: ScheduleLike, ranks: int) -> tuple[int, ...]:
    """Return the rank of every stage of a model that is trained with ``schedule`` on ``ranks`` ranks.

    Raises ValueError for an unknown name, or a table made for another number of ranks.

    >>> import fstep
    >>> fstep.stage_ranks("1f1b", 2), fstep.stage_ranks("interleaved", 2), fstep.stage_ranks(fstep.zbv, 2)
    ((0, 1), (0, 1, 0, 1), (0, 1, 1, 0))
    """
    check_type("stage_ranks", "ranks", ranks, int, "a number of ranks, e.g. mesh.pp.size")
    # Which rank has which stage does not depend on the number of microbatches; this many are enough for all.
    number = schedule.microbatches if isinstance(schedule, Schedule) else 2 * ranks
    return schedule_for("stage_ranks", schedule, ranks, number).rank_of
