"""The known pipeline schedules, each a function of the number of ranks and of microbatches that returns a `Schedule`.

    p=4, m=8                 idle    peak (microbatches a rank holds, in shares of its part of the model)
    gpipe                     27%    8
    1f1b                      27%    4, 3, 2, 1
    interleaved, v=2          16%    5.5, 4.5, 3.5, 2.5
    interleaved zero-bubble    6%    6, 6.5, 5.5, 4.5
    zbv                        8%    4
    dualpipev                  6%    4.5

Idle is for a backward of twice a forward, split in equal halves, and messages that take no time. Any number of microbatches
works, fewer than ranks included (dualpipev needs twice as many as ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from fstep.grad.schedule import UNIT_COSTS, Action, Costs, Schedule

Order = list[tuple[str, int, int]]


def _costs(i: float, w: float) -> Costs:
    return {"F": 1.0, "B": i + w, "I": i, "W": w}


# Attention has no weights, so that an input half costs more than a weight half, and how much depends on the documents.
LIKELY = (UNIT_COSTS, _costs(1.15, 0.85), _costs(1.3, 0.8))
GUESSES = (UNIT_COSTS, _costs(1.1, 0.9), _costs(1.2, 0.6), _costs(1.3, 0.6), _costs(1.3, 1.1), _costs(1.4, 0.8))


def _check(name: str, ranks: int, microbatches: int, stages: int = 1) -> None:
    for what, value in (("ranks", ranks), ("microbatches", microbatches), ("stages a rank", stages)):
        if value < 1:
            raise ValueError(f"{name}: {value} {what}; pass 1 or more")


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al., 2019): simple, and holds every microbatch.

    >>> import fstep
    >>> fstep.gpipe(2, 2).actions[1]
    (F1.0, F1.1, B1.0, B1.1)
    """
    _check("gpipe", ranks, microbatches)
    rows = [tuple(Action(k, r, m) for k in "FB" for m in range(microbatches)) for r in range(ranks)]
    return Schedule("gpipe", tuple(range(ranks)), microbatches, tuple(rows))


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """One forward, one backward in turn once the pipe is full (Narayanan et al., 2019): holds at most ``ranks - rank``.

    >>> import fstep
    >>> fstep.one_f_one_b(2, 3).actions[0]
    (F0.0, F0.1, B0.0, F0.2, B0.1, B0.2)
    """
    _check("one_f_one_b", ranks, microbatches)
    return _looped("1f1b", ranks, microbatches, 1, split=False)


def interleaved(ranks: int, microbatches: int, stages: int = 2) -> Schedule:
    """1f1b with several stages a rank, dealt out in turn (Narayanan et al., 2021): the idle time shrinks by ``stages``.

    Stage s is on rank s mod ranks. Microbatches go in groups of about ``ranks``, each group through one stage of a rank
    before the next.

    >>> import fstep
    >>> round(fstep.interleaved(4, 8).stats().idle, 3)
    0.158
    """
    _check("interleaved", ranks, microbatches, stages)
    return _looped("interleaved", ranks, microbatches, stages, split=False)


def interleaved_zero_bubble(ranks: int, microbatches: int, stages: int = 2) -> Schedule:
    """Interleaved, with each backward split in its input half, which others wait for, and its weight half, which fills gaps.

    After Qi et al., "Zero bubble pipeline parallelism", 2023. A rank holds at most ``ranks`` more than interleaved before it
    works off weight halves.

    >>> import fstep
    >>> round(fstep.interleaved_zero_bubble(4, 8).stats().idle, 3)
    0.059
    """
    _check("interleaved_zero_bubble", ranks, microbatches, stages)
    return _looped("interleaved zero-bubble", ranks, microbatches, stages, split=True)


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Cut the microbatches in even groups of at least ``ranks``, so that a group fills the pipe."""
    number = max(1, microbatches // ranks)
    cuts = [g * microbatches // number for g in range(number + 1)]
    return [range(a, b) for a, b in pairwise(cuts)]


def _looped(name: str, ranks: int, microbatches: int, stages: int, *, split: bool) -> Schedule:
    groups = _groups(ranks, microbatches)
    longest = max(map(len, groups))
    orders: list[Order] = []
    caps = []
    for r in range(ranks):
        forward = [("F", c * ranks + r, m) for g in groups for c in range(stages) for m in g]
        backward = [("B", c * ranks + r, m) for g in groups for c in reversed(range(stages)) for m in g]
        # With one stage the last rank turns round at once; with several the first group has to come round for each.
        warm = ranks - r - 1 if stages == 1 else 2 * (ranks - r - 1) + (stages - 1) * longest
        warm = min(warm, len(forward))
        alternating = [a for pair in zip(forward[warm:], backward, strict=False) for a in pair]
        orders.append(forward[:warm] + alternating + backward[len(forward) - warm :])
        caps.append(warm + 1 + ranks)
    rank_of = [s % ranks for s in range(ranks * stages)]
    return _run(name, rank_of, microbatches, [_in_order(o) for o in orders], caps if split else None)


def zbv(ranks: int, microbatches: int) -> Schedule:
    """Two stages a rank laid out as a V, backward split in halves (Qi et al., 2024): nearly no idle time in 1f1b's memory.

    Rank r holds stages r and 2p-1-r, so that the last stage is where the first is. Each rank holds at most p. With so little
    room a table made for one ratio of the halves' costs waits at every turn under another (17% instead of 6% where the
    input half costs a third more); this is the one of a few that is best on the average of what is likely.

    >>> import fstep
    >>> fstep.zbv(4, 8).stats().peak_live
    (4.0, 4.0, 4.0, 4.0)
    """
    _check("zbv", ranks, microbatches)
    last = 2 * ranks - 1

    def chooser(rank: int) -> Chooser:
        count = {("F", rank): 0, ("F", last - rank): 0, ("B", rank): 0, ("B", last - rank): 0}

        def choose(ready: Callable[[str, int, int], bool], live: int) -> tuple[str, int, int] | None:
            down, up = rank, last - rank
            # What others wait for first; a place is kept free for the way back up, or nothing could ever come back.
            for kind, stage, room in (
                ("B", up, True),
                ("B", down, True),
                ("F", up, live < 2 * ranks),
                ("F", down, live < last),
            ):
                m = count[kind, stage]
                if m < microbatches and room and ready(kind, stage, m):
                    count[kind, stage] += 1
                    return kind, stage, m
            return None

        return choose

    rank_of = [*range(ranks), *reversed(range(ranks))]
    caps = [2 * ranks] * ranks
    tables = [_run("zbv", rank_of, microbatches, [chooser(r) for r in range(ranks)], caps, costs) for costs in GUESSES]
    return min(tables, key=lambda table: sum(table.stats(costs).idle for costs in LIKELY))


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """The V-shaped half of DeepSeek's DualPipe (Sea AI Lab and DeepSeek, 2025), in pairs of a forward and a backward.

    Rank r holds stages r and 2p-1-r. In its steady state each forward stands beside a backward of another microbatch, so
    that communication inside one can hide behind the other.

    Raises ValueError for fewer than 2 * ranks microbatches.

    >>> import fstep
    >>> round(fstep.dualpipev(4, 8).stats().idle, 3)
    0.059
    """
    _check("dualpipev", ranks, microbatches)
    if microbatches < 2 * ranks:
        raise ValueError(f"dualpipev: {microbatches} microbatches for {ranks} ranks; pass {2 * ranks} or more, or use zbv")
    last = 2 * ranks - 1
    rows = [_dualpipev_row((r, last - r), r, ranks, microbatches) for r in range(ranks)]
    return Schedule("dualpipev", (*range(ranks), *reversed(range(ranks))), microbatches, tuple(rows))


def _dualpipev_row(stage: tuple[int, int], rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    row: list[Action] = []
    done = {(kind, way): 0 for kind in "FB" for way in (0, 1)}
    owed: list[Action] = []

    def run(kind: str, way: int) -> None:
        counter = ("F" if kind == "F" else "B", way)
        m = done[counter]
        done[counter] += 1
        row.append(Action(kind, stage[way], m))
        if kind == "I":
            owed.append(Action("W", stage[way], m))

    after = ranks - rank - 1  # ranks further down the V
    for _ in range(2 * after):
        run("F", 0)
    for _ in range(rank + 1):
        run("F", 0)
        run("F", 1)
    for _ in range(after):
        run("I", 1)
        row.append(owed.pop(0))
        run("F", 1)
    for _ in range(microbatches - 2 * ranks + rank + 1):
        for kind, way in (("F", 0), ("B", 1), ("F", 1), ("B", 0)):
            run(kind, way)
    for _ in range(after):
        for kind, way in (("B", 1), ("F", 1), ("B", 0)):
            run(kind, way)
    # The pipe drains: from halfway on only the input halves are done at once.
    half, odd = (rank + 1) // 2, rank % 2
    for i in range(rank + 1):
        run("I" if i > half or (i == half and odd) else "B", 1)
        run("I" if i >= half else "B", 0)
    for _ in range(after):
        row.append(owed.pop(0))
        run("I", 0)
    return (*row, *owed)


Chooser = Callable[[Callable[[str, int, int], bool], int], "tuple[str, int, int] | None"]


def _in_order(order: Order) -> Chooser:
    """Take what comes next in a fixed order, as soon as its input is there."""
    left = iter(order)
    head = [next(left, None)]

    def choose(ready: Callable[[str, int, int], bool], live: int) -> tuple[str, int, int] | None:
        a = head[0]
        if a is None or not ready(*a):
            return None
        head[0] = next(left, None)
        return a

    return choose


def _run(
    name: str,
    rank_of: Sequence[int],
    microbatches: int,
    choosers: Sequence[Chooser],
    caps: Sequence[int] | None,
    costs: Costs = UNIT_COSTS,
) -> Schedule:
    """Make the table by running it: whenever a rank is free its chooser says which forward or backward is next.

    With ``caps`` backward passes are split: their weight halves are done when there is nothing else to do, or before a rank
    would hold more than its cap.
    """
    last, ranks = len(rank_of) - 1, len(choosers)
    done: dict[tuple[str, int, int], float] = {}
    rows: list[list[Action]] = [[] for _ in choosers]
    owed: list[list[Action]] = [[] for _ in choosers]
    free, live, now = [0.0] * ranks, [0] * ranks, 0.0
    left = len(rank_of) * microbatches * (2 if caps is None else 3)

    def arrived(kind: str, stage: int, m: int) -> bool:
        return done.get((kind, stage, m), now + 1) <= now

    while left:
        for rank, choose in enumerate(choosers):
            if free[rank] > now:
                continue
            full = caps is not None and live[rank] >= caps[rank] and bool(owed[rank])

            def ready(kind: str, stage: int, m: int, full: bool = full) -> bool:
                if kind == "F":
                    return not full and (stage == 0 or arrived("F", stage - 1, m))
                return arrived("F", stage, m) and (stage == last or arrived("B", stage + 1, m))

            chosen = choose(ready, live[rank])
            if chosen is None:
                if not owed[rank]:
                    continue
                a = owed[rank].pop(0)
                live[rank] -= 1
            else:
                kind, stage, m = chosen
                a = Action("I" if kind == "B" and caps is not None else kind, stage, m)
                if a.kind == "I":
                    owed[rank].append(Action("W", stage, m))
                live[rank] += {"F": 1, "B": -1, "I": 0}[a.kind]
                done[chosen] = now + costs[a.kind]
            rows[rank].append(a)
            free[rank] = now + costs[a.kind]
            left -= 1
        later = [t for t in free if t > now]
        if left and not later:
            raise AssertionError(
                f"{name}: {ranks} ranks and {microbatches} microbatches wait for each other; please report this"
            )
        now = min(later, default=now)
    return Schedule(name, tuple(rank_of), microbatches, tuple(map(tuple, rows)))
