"""`Schedule`: who runs which microbatch of which stage when, as an immutable table that is checked when it is made.

    1f1b, 3 ranks, 4 microbatches        F forward   B backward (I its input half, W its weight half)

    rank 0   F0 F1 F2          B0 F3 B1    B2    B3
    rank 1      F0 F1    B0 F2 B1    F3 B2    B3
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3

A stage is a part of the model; a rank may hold several. The table is data: `fstep.grad.schedules` makes the known ones,
and any other table that passes the constructor's checks runs as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("F", "B", "I", "W")
Costs = Mapping[str, float]
UNIT_COSTS: Costs = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
COLOURS = {"F": "#7fa8d9", "B": "#8fc28a", "I": "#8fc28a", "W": "#d9c27f"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input half", "W": "backward, weight half"}
UNIT, ROW, LEFT, TOP = 22, 26, 64, 34


class Action(NamedTuple):
    """One thing a rank does: ``kind`` F, B, I or W, for a ``stage`` and a ``microbatch``.

    >>> import fstep
    >>> fstep.Action("F", stage=0, microbatch=2)
    F0.2
    """

    kind: str
    stage: int
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


class Span(NamedTuple):
    """An action and when it starts and ends.

    >>> import fstep
    >>> fstep.gpipe(1, 1).timeline()[0][1] == fstep.Span(fstep.Action("B", 0, 0), start=1.0, end=3.0)
    True
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class ScheduleStats:
    """What a schedule costs: its length, the share of time ranks are idle, and what each rank holds at most.

    ``peak_live[r]`` counts forward passes not yet followed by their backward, in units of a rank's whole share of the model.

    >>> import fstep
    >>> fstep.gpipe(2, 2).stats() == fstep.ScheduleStats(length=9.0, idle=1 - 12 / 18, peak_live=(2.0, 2.0))
    True
    """

    length: float
    idle: float
    peak_live: tuple[float, ...]


@dataclass(frozen=True)
class Schedule:
    """A table of actions, one row a rank, for ``microbatches`` microbatches and stages on the ranks ``rank_of``.

    The constructor proves that the table can be run: each stage has for each microbatch one F and either one B or an I and
    then a W; nothing waits for what comes later (no deadlock); and on each channel from rank to rank, forward and
    backward apart, things are received in the order in which they are sent, so that no message needs a name.

    Raises ValueError naming the first action that is wrong.

    >>> import fstep
    >>> F, B = (lambda s, m: fstep.Action("F", s, m)), (lambda s, m: fstep.Action("B", s, m))
    >>> table = ((F(0, 0), F(0, 1), B(0, 0), B(0, 1)), (F(1, 0), B(1, 0), F(1, 1), B(1, 1)))
    >>> fstep.Schedule("mine", rank_of=(0, 1), microbatches=2, actions=table).stats().length
    9.0
    """

    name: str
    rank_of: tuple[int, ...]
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        rows = self.actions if isinstance(self.actions, tuple) else ()
        if not all(isinstance(row, tuple) and all(isinstance(a, Action) for a in row) for row in rows) or not (
            isinstance(self.rank_of, tuple) and isinstance(self.actions, tuple)
        ):
            raise TypeError(f"Schedule {self.name!r}: pass rank_of as a tuple, and actions as a tuple of tuples of Action")
        if self.microbatches < 1 or not self.actions:
            raise ValueError(
                f"Schedule {self.name!r}: {self.microbatches} microbatches, {len(self.actions)} ranks; pass 1 or more"
            )
        if sorted(set(self.rank_of)) != list(range(len(self.actions))):
            raise ValueError(
                f"Schedule {self.name!r}: stages are on ranks {sorted(set(self.rank_of))} of {len(self.actions)}"
            )
        self._check_complete()
        self._check_channels()
        self.timeline()

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.rank_of)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that ``rank`` holds, in order."""
        return tuple(s for s, r in enumerate(self.rank_of) if r == rank)

    def forward_only(self) -> Schedule:
        """Return the same schedule without its backward passes, for evaluation and scoring."""
        rows = tuple(tuple(a for a in row if a.kind == "F") for row in self.actions)
        return Schedule(f"{self.name}, forward", self.rank_of, self.microbatches, rows)

    def _check_complete(self) -> None:
        seen = Counter(a for row in self.actions for a in row)
        for rank, row in enumerate(self.actions):
            for a in row:
                known = a.kind in KINDS and 0 <= a.stage < self.stages and 0 <= a.microbatch < self.microbatches
                if not known or self.rank_of[a.stage] != rank:
                    raise ValueError(f"Schedule {self.name!r}: rank {rank} has {a}, which is no action of a stage it holds")
                if seen[a] > 1:
                    raise ValueError(f"Schedule {self.name!r}: {a} is there {seen[a]} times; once is right")
        trains = any(a.kind != "F" for a in seen)
        for stage in range(self.stages):
            for m in range(self.microbatches):
                kinds = "".join(k for k in KINDS if Action(k, stage, m) in seen)
                if kinds not in (("FB", "FIW") if trains else ("F",)):
                    raise ValueError(
                        f"Schedule {self.name!r}: stage {stage} has {kinds or 'nothing'} for microbatch {m}; it needs F and "
                        "either B or both I and W"
                    )

    def needs(self, a: Action) -> list[Action]:
        """List the actions whose results ``a`` uses."""
        if a.kind == "F":
            return [Action("F", a.stage - 1, a.microbatch)] if a.stage else []
        if a.kind == "W":
            return [Action("I", a.stage, a.microbatch)]
        before = [Action("F", a.stage, a.microbatch)]
        if a.stage + 1 < self.stages:
            kind = "I" if self._split(a.stage + 1, a.microbatch) else "B"
            before.append(Action(kind, a.stage + 1, a.microbatch))
        return before

    def _split(self, stage: int, microbatch: int) -> bool:
        return Action("I", stage, microbatch) in self.actions[self.rank_of[stage]]

    def _check_channels(self) -> None:
        """Compare, for each pair of ranks and direction, the order of sending with that of receiving."""
        sent: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
        received: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
        for rank, row in enumerate(self.actions):
            for a in row:
                if a.kind == "W":
                    continue
                way, step = ("forward", 1) if a.kind == "F" else ("backward", -1)
                to, came = a.stage + step, a.stage - step
                if 0 <= to < self.stages and self.rank_of[to] != rank:
                    sent.setdefault((rank, self.rank_of[to], way), []).append((to, a.microbatch))
                if 0 <= came < self.stages and self.rank_of[came] != rank:
                    received.setdefault((self.rank_of[came], rank, way), []).append((a.stage, a.microbatch))
        for channel, order in sent.items():
            for out, into in zip(order, received[channel], strict=True):
                if out != into:
                    raise ValueError(
                        f"Schedule {self.name!r}: rank {channel[0]} sends {channel[2]} stage {out[0]}, microbatch {out[1]} "
                        f"to rank {channel[1]}, which expects stage {into[0]}, microbatch {into[1]}; receive in the order "
                        "of sending"
                    )

    def timeline(self, costs: Costs = UNIT_COSTS) -> tuple[tuple[Span, ...], ...]:
        """Return when each action runs if each kind takes its ``costs`` and messages take no time.

        Raises ValueError if ranks wait for each other.
        """
        done: dict[Action, float] = {}
        rows: list[list[Span]] = [[] for _ in self.actions]
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.actions):
                while len(rows[rank]) < len(row):
                    a = row[len(rows[rank])]
                    before = self.needs(a)
                    if not all(b in done for b in before):
                        break
                    free = rows[rank][-1].end if rows[rank] else 0.0
                    start = max([free, *(done[b] for b in before)])
                    done[a] = start + costs[a.kind]
                    rows[rank].append(Span(a, start, done[a]))
                    moved = True
        stuck = [
            f"rank {r} waits at {row[len(rows[r])]} for {[b for b in self.needs(row[len(rows[r])]) if b not in done]}"
            for r, row in enumerate(self.actions)
            if len(rows[r]) < len(row)
        ]
        if stuck:
            raise ValueError(f"Schedule {self.name!r}: deadlock; {'; '.join(stuck)}")
        return tuple(tuple(row) for row in rows)

    def draw(self, costs: Costs = UNIT_COSTS) -> str:
        """Return the schedule as an SVG picture: a row a rank, time to the right.

        >>> import fstep
        >>> fstep.gpipe(2, 3).draw()[:4]
        '<svg'
        """
        return _draw(self, costs)

    def stats(self, costs: Costs = UNIT_COSTS) -> ScheduleStats:
        """Return length, idle share and peak memory of the schedule.

        >>> import fstep
        >>> fstep.one_f_one_b(4, 8).stats().peak_live
        (4.0, 3.0, 2.0, 1.0)
        """
        rows = self.timeline(costs)
        length = max(span.end for row in rows for span in row)
        busy = sum(span.end - span.start for row in rows for span in row)
        peaks = []
        for rank, row in enumerate(self.actions):
            live = most = 0
            for a in row:
                live += {"F": 1, "B": -1, "I": 0, "W": -1}[a.kind]
                most = max(most, live)
            peaks.append(most / len(self.stages_of(rank)))
        return ScheduleStats(length, 1 - busy / (length * len(rows)), tuple(peaks))


def _draw(schedule: Schedule, costs: Costs) -> str:
    """Draw one row a rank, one box an action; later stages of a rank are darker, gaps are idle time."""
    rows, stats = schedule.timeline(costs), schedule.stats(costs)
    width, height = LEFT + UNIT * stats.length + 16, TOP + ROW * len(rows) + 40
    kinds = [k for k in COLOURS if any(s.action.kind == k for row in rows for s in row)]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        f'<text x="8" y="20" font-size="13">{schedule.name}: {len(rows)} ranks, {schedule.stages} stages, '
        f"{schedule.microbatches} microbatches, {stats.idle:.0%} idle</text>",
    ]
    for rank, row in enumerate(rows):
        y = TOP + ROW * rank
        stages = schedule.stages_of(rank)
        out.append(f'<text x="8" y="{y + 17}">rank {rank}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{UNIT * stats.length:g}" height="{ROW - 2}" fill="#eeeeee"/>')
        for span in row:
            x, w = LEFT + UNIT * span.start, UNIT * (span.end - span.start)
            shade = 0.55 * stages.index(span.action.stage) / max(1, len(stages) - 1)
            box = f'x="{x:g}" y="{y}" width="{w:g}" height="{ROW - 2}"'
            out.append(f'<rect {box} fill="{COLOURS[span.action.kind]}" stroke="white"/>')
            if shade:
                out.append(f'<rect {box} fill="#334455" fill-opacity="{shade / 2:.2f}"/>')
            out.append(
                f'<text x="{x + w / 2:g}" y="{y + 16}" text-anchor="middle">{span.action.microbatch}'
                f"<title>{span.action.kind}: stage {span.action.stage}, microbatch {span.action.microbatch}</title></text>"
            )
    x, y = LEFT, TOP + ROW * len(rows) + 12
    for kind in kinds:
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[kind]}"/>')
        out.append(f'<text x="{x + 20}" y="{y + 11}">{NAMES[kind]}</text>')
        x += 40 + 7 * len(NAMES[kind])
    return "\n".join([*out, "</svg>"])
