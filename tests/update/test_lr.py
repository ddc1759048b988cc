"""Learning rates by hand arithmetic: every corner of every schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fstep.update.lr import constant, warmup_cosine, warmup_linear, wsd

COS = math.cos(math.pi / 4)  # a quarter of the way down


@pytest.mark.parametrize(
    ("f", "kwargs", "expected"),
    [
        (constant, {"peak": 3.0}, {0: 3.0, 10**7: 3.0}),
        # warmup 4: a quarter a step, the peak at step 3; then 8 steps down to the floor at step 12.
        (
            warmup_cosine,
            {"peak": 2.0, "warmup": 4, "total": 12, "floor": 1.0},
            {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 6: 1.5 + COS / 2, 8: 1.5, 10: 1.5 - COS / 2, 12: 1.0, 13: 1.0, 10**6: 1.0},
        ),
        (
            warmup_linear,
            {"peak": 2.0, "warmup": 4, "total": 12, "floor": 1.0},
            {0: 0.5, 3: 2.0, 4: 2.0, 5: 1.875, 8: 1.5, 11: 1.125, 12: 1.0, 100: 1.0},
        ),
        (
            wsd,
            {"peak": 2.0, "warmup": 4, "total": 12, "decay": 4, "floor": 1.0},
            {0: 0.5, 3: 2.0, 4: 2.0, 7: 2.0, 8: 2.0, 9: 1.75, 11: 1.25, 12: 1.0, 100: 1.0},
        ),
        # No warm-up starts at the peak, all warm-up ends at the floor, no decay falls off an edge.
        (warmup_cosine, {"peak": 2.0, "warmup": 0, "total": 2}, {0: 2.0, 1: 1.0, 2: 0.0, 5: 0.0}),
        (warmup_linear, {"peak": 2.0, "warmup": 0, "total": 2}, {0: 2.0, 1: 1.0, 2: 0.0, 5: 0.0}),
        (warmup_cosine, {"peak": 2.0, "warmup": 2, "total": 2}, {0: 1.0, 1: 2.0, 2: 0.0, 3: 0.0}),
        (warmup_linear, {"peak": 2.0, "warmup": 2, "total": 2}, {0: 1.0, 1: 2.0, 2: 0.0, 3: 0.0}),
        (wsd, {"peak": 2.0, "warmup": 1, "total": 3, "decay": 0}, {0: 2.0, 1: 2.0, 2: 2.0, 3: 0.0}),
        (wsd, {"peak": 2.0, "warmup": 1, "total": 3, "decay": 2}, {0: 2.0, 1: 2.0, 2: 1.0, 3: 0.0}),
    ],
)
def test_by_hand(f: Any, kwargs: Any, expected: dict[int, float]) -> None:
    for step, value in expected.items():
        exact = f(torch.tensor(step, dtype=torch.float64), **kwargs)
        assert exact.dtype == torch.float64
        assert abs(float(exact) - value) < 1e-14, step
        for s in (step, torch.tensor(step), torch.tensor(step, dtype=torch.int32), torch.tensor(float(step))):
            rate = f(s, **kwargs)
            assert rate.dtype == torch.float32
            assert rate.ndim == 0
            assert abs(float(rate) - value) < 1e-6, step


SCHEDULES = [
    lambda s: constant(s, peak=0.1),
    lambda s: warmup_cosine(s, peak=0.1, warmup=3, total=9),
    lambda s: warmup_linear(s, peak=0.1, warmup=3, total=9),
    lambda s: wsd(s, peak=0.1, warmup=3, total=9, decay=2),
]


@pytest.mark.parametrize("f", SCHEDULES)
def test_vmap_compile_and_waiting(f: Any, no_waiting: Any) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    steps = torch.arange(12)
    alone = torch.stack([f(s) for s in steps])
    assert torch.equal(torch.func.vmap(f)(steps), alone)
    with no_waiting():
        f(steps[0])
    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    assert torch.equal(torch.stack([compiled(s.clone()) for s in steps]), alone)
    assert len(graphs) == 1


def test_pure() -> None:
    step = torch.tensor(3)
    for f in SCHEDULES:
        f(step)
    assert (int(step), step._version) == (3, 0)


@pytest.mark.parametrize(
    ("f", "kwargs", "message"),
    [
        (constant, {"peak": -1.0}, "peak is -1.0"),
        (constant, {"peak": float("nan")}, "peak is nan"),
        (warmup_cosine, {"peak": 1.0, "warmup": -1, "total": 5}, "warmup is -1 of total=5"),
        (warmup_cosine, {"peak": 1.0, "warmup": 6, "total": 5}, "warmup is 6 of total=5"),
        (warmup_linear, {"peak": 1.0, "warmup": 0, "total": 0}, "total is 0"),
        (warmup_linear, {"peak": 1.0, "warmup": 0, "total": 5, "floor": 2.0}, "peak is 1.0 and floor is 2.0"),
        (warmup_linear, {"peak": 1.0, "warmup": 0, "total": 5, "floor": -0.5}, "peak is 1.0 and floor is -0.5"),
        (wsd, {"peak": 1.0, "warmup": 3, "total": 5, "decay": 3}, "warmup=3 and decay=3 steps do not fit"),
        (wsd, {"peak": 1.0, "warmup": 3, "total": 5, "decay": -1}, "warmup=3 and decay=-1"),
    ],
)
def test_bad_arguments(f: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{f.__name__}: {message}"):
        f(0, **kwargs)


@pytest.mark.parametrize("f", [constant, warmup_linear])
def test_bad_steps(f: Any) -> None:
    kwargs = {"peak": 1.0} if f is constant else {"peak": 1.0, "warmup": 1, "total": 2}
    with pytest.raises(TypeError, match=f"^{f.__name__}: step is 1.5"):
        f(1.5, **kwargs)
    with pytest.raises(ValueError, match=rf"^{f.__name__}: step has shape \(3,\)"):
        f(torch.arange(3), **kwargs)
