"""Schedules: against the published formulas, and by running them for real over queues that know no names."""

import itertools
import queue
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import fstep
from fstep import Action, Schedule

MAKERS = {
    "gpipe": fstep.gpipe,
    "1f1b": fstep.one_f_one_b,
    "interleaved": fstep.interleaved,
    "interleaved 3": lambda p, m: fstep.interleaved(p, m, 3),
    "zero-bubble": fstep.interleaved_zero_bubble,
    "zero-bubble 1": lambda p, m: fstep.interleaved_zero_bubble(p, m, 1),
    "zbv": fstep.zbv,
    "dualpipev": fstep.dualpipev,
}
GRID = [
    (name, p, m)
    for name, p, m in itertools.product(MAKERS, (1, 2, 3, 4), (1, 2, 3, 4, 5, 7, 8, 12))
    if name != "dualpipev" or m >= 2 * p
]


def run_over_queues(schedule: Schedule) -> list[list[tuple]]:
    """One thread a rank; a message is what it carries, and who takes it is decided by the order of taking alone."""
    channels: dict[tuple, queue.Queue] = {}
    lock = threading.Lock()
    last = schedule.stages - 1
    computed: list[list[tuple]] = [[] for _ in schedule.actions]

    def channel(*key) -> queue.Queue:
        with lock:
            return channels.setdefault(key, queue.Queue())

    def rank_main(rank: int) -> None:
        kept: dict[tuple, tuple] = {}
        for kind, stage, m in schedule.actions[rank]:
            if kind == "W":
                computed[rank].append(("W", stage, kept.pop(("I", stage, m))))
                continue
            step = 1 if kind == "F" else -1
            came, to = stage - step, stage + step
            way = "forward" if kind == "F" else "backward"
            if kind == "F" and stage == 0:
                value: tuple = (m,)
            elif kind != "F" and stage == last:
                value = kept[("F", stage, m)]
            else:
                source = schedule.rank_of[came]
                value = kept.pop((way, stage, m)) if source == rank else channel(source, rank, way).get(timeout=5)
            if kind == "F":
                kept["F", stage, m] = value
            else:
                kept.pop(("F", stage, m))
                kept["I", stage, m] = value
                computed[rank].append((kind, stage, value))
            if 0 <= to <= last:
                passed = (*value, f"{way}{stage}")
                if schedule.rank_of[to] == rank:
                    kept[way, to, m] = passed
                else:
                    channel(rank, schedule.rank_of[to], way).put(passed)

    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            rank_main(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(r,)) for r in range(len(schedule.actions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not errors, errors
    return computed


@pytest.mark.parametrize(("name", "p", "m"), GRID)
def test_every_message_reaches_whom_it_is_for(name: str, p: int, m: int) -> None:
    schedule = MAKERS[name](p, m)
    assert len(schedule.actions) == p and schedule.microbatches == m
    last = schedule.stages - 1
    inputs = {(s, v[0]): v for row in run_over_queues(schedule) for kind, s, v in row if kind != "W"}
    for stage, i in itertools.product(range(schedule.stages), range(m)):
        down = [f"forward{s}" for s in range(last)]
        back = [f"backward{s}" for s in range(last, stage, -1)]
        assert inputs[stage, i] == (i, *down, *back)


@pytest.mark.parametrize(("name", "p", "m"), GRID)
def test_nothing_but_forward_passes_is_left_for_evaluation(name: str, p: int, m: int) -> None:
    schedule = MAKERS[name](p, m).forward_only()
    assert sorted(a for row in schedule.actions for a in row) == sorted(
        Action("F", s, i) for s in range(schedule.stages) for i in range(m)
    )


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 8), (4, 16), (8, 16), (4, 3)])
def test_idle_share_and_memory_are_the_published_ones(p: int, m: int) -> None:
    forward, backward, half = 1, 2, 1
    busy = m * (forward + backward)

    def idle(bubble: float) -> float:
        return bubble / (busy + bubble)

    for maker in (fstep.gpipe, fstep.one_f_one_b):
        assert maker(p, m).stats().idle == pytest.approx(idle((p - 1) * (forward + backward)))
    assert fstep.gpipe(p, m).stats().peak_live == (m,) * p
    assert fstep.one_f_one_b(p, m).stats().peak_live == tuple(min(m, p - r) for r in range(p))
    if m % p == 0:
        for v in (2, 3, 4):
            stats = fstep.interleaved(p, m, v).stats()
            assert stats.idle == pytest.approx(idle((p - 1) * (forward + backward) / v))
            if m > p:
                assert stats.peak_live == tuple((2 * (p - r - 1) + (v - 1) * p + 1) / v for r in range(p))
            zero_bubble = fstep.interleaved_zero_bubble(p, m, v).stats()
            assert zero_bubble.idle <= idle((p - 1) * (forward + half - half) / v) + 1e-9 or m == p
            assert zero_bubble.idle < stats.idle
    assert max(fstep.zbv(p, m).stats().peak_live) <= p
    assert fstep.zbv(p, m).stats().idle < fstep.one_f_one_b(p, m).stats().idle
    if m >= 2 * p:
        assert max(fstep.dualpipev(p, m).stats().peak_live) == p + 0.5
        assert fstep.dualpipev(p, m).stats().idle <= idle((p - 1) * (forward + half - half) / 2) + 1e-9


def test_zbv_does_not_depend_on_equal_halves() -> None:
    """An input half costs more than a weight half, and nobody knows how much: 6% idle must not become 15%."""
    for m, most in ((8, 0.09), (16, 0.05)):
        table = fstep.zbv(4, m)
        for i, w in ((1.0, 1.0), (1.05, 0.95), (1.15, 0.85), (1.3, 0.8)):
            assert table.stats({"F": 1.0, "B": i + w, "I": i, "W": w}).idle < most, (m, i, w)


def test_timeline_of_a_small_table_by_hand() -> None:
    #    rank 0   F0 F1 .. .. B0 B0 .. B1 B1        rank 1   .. F0 B0 B0 F1 B1 B1
    schedule = fstep.one_f_one_b(2, 2)
    first, second = ([(str(s.action), s.start, s.end) for s in row] for row in schedule.timeline())
    assert first == [("F0.0", 0, 1), ("F0.1", 1, 2), ("B0.0", 4, 6), ("B0.1", 7, 9)]
    assert second == [("F1.0", 1, 2), ("B1.0", 2, 4), ("F1.1", 4, 5), ("B1.1", 5, 7)]
    assert schedule.stats().length == 9 and schedule.stats().idle == pytest.approx(1 - 12 / 18)
    slow = schedule.stats({"F": 2.0, "B": 4.0, "I": 0, "W": 0})
    assert slow.length == 18 and slow.idle == schedule.stats().idle


def table(*rows: str) -> tuple[tuple[Action, ...], ...]:
    """Write actions like F0.1, as they are printed."""
    return tuple(tuple(Action(a[0], *map(int, a[1:].split("."))) for a in row.split()) for row in rows)


GOOD = ("F0.0 F0.1 B0.0 B0.1", "F1.0 B1.0 F1.1 B1.1")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("F0.0 F0.1 B0.0 B0.1 F0.0", GOOD[1]), "F0.0 is there 2 times"),
        (("F0.0 F0.1 B0.0", GOOD[1]), "stage 0 has F for microbatch 1"),
        (("F0.0 F0.1 B0.0 I0.1", GOOD[1]), "stage 0 has FI for microbatch 1"),
        (("F0.0 F0.1 B0.0 B0.1 F1.0", "B1.0 F1.1 B1.1"), "rank 0 has F1.0, which is no action of a stage it holds"),
        (("F0.0 F0.1 B0.0 B0.1 F0.2", GOOD[1]), "rank 0 has F0.2"),
        (("X0.0", GOOD[1]), "rank 0 has X0.0"),
        (
            ("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"),
            r"deadlock; rank 0 waits at B0.0 for \[B1.0\]; rank 1 waits at F1.1",
        ),
        (
            ("F0.0 F0.1 B0.0 B0.1", "F1.1 B1.1 F1.0 B1.0"),
            "rank 0 sends forward stage 1, microbatch 0 to rank 1, which expects",
        ),
        (("F0.0 F0.1 B0.1 B0.0", "F1.0 B1.0 F1.1 B1.1"), "rank 1 sends backward stage 0, microbatch 0 to rank 0"),
        (("F0.0 W0.0 I0.0 F0.1 B0.1", GOOD[1]), "deadlock"),
    ],
)
def test_a_table_that_cannot_run_is_refused(rows: tuple[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Schedule("mine", (0, 1), 2, table(*rows))
    assert Schedule("mine", (0, 1), 2, table(*GOOD)).stats().idle > 0


def test_wrong_sizes_are_refused() -> None:
    for maker in (
        fstep.gpipe,
        fstep.one_f_one_b,
        fstep.interleaved,
        fstep.interleaved_zero_bubble,
        fstep.zbv,
        fstep.dualpipev,
    ):
        with pytest.raises(ValueError, match="0 ranks"):
            maker(0, 4)
        with pytest.raises(ValueError, match="0 microbatches"):
            maker(2, 0)
    with pytest.raises(ValueError, match="3 microbatches for 2 ranks; pass 4 or more, or use zbv"):
        fstep.dualpipev(2, 3)
    with pytest.raises(ValueError, match="stages are on ranks"):
        Schedule("mine", (0, 2), 2, table(*GOOD))


@pytest.mark.parametrize("name", MAKERS)
def test_the_picture_has_a_box_for_every_action(name: str) -> None:
    schedule = MAKERS[name](3, 6)
    picture = ElementTree.fromstring(schedule.draw())
    titles = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(
        f"{a.kind}: stage {a.stage}, microbatch {a.microbatch}" for row in schedule.actions for a in row
    )
    assert f"{schedule.stats().idle:.0%} idle" in schedule.draw()


def test_a_table_without_a_backward_pass_trains_nothing() -> None:
    """Its gradients would be 0, without a word."""
    stage, loss = lambda p, x, mb: mb * p["w"], lambda p, x, mb: fstep.Ratio(x.sum(), torch.ones(()))
    table = fstep.gpipe(1, 1).forward_only()
    with pytest.raises(ValueError, match=r"pp_forward_backward: schedule 'gpipe.*' has no backward pass"):
        fstep.pp_forward_backward(stage, loss, {"w": torch.ones(2)}, [torch.ones(2)], schedule=table)
    assert fstep.pp_forward(stage, lambda p, x, mb: x, {"w": torch.ones(2)}, [torch.ones(2)], schedule=table)
    assert fstep.stage_ranks(fstep.zbv(2, 4).forward_only(), 2) == (0, 1, 1, 0)  # to cut params for evaluation
