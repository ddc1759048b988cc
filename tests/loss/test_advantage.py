"""Advantages against Python's statistics of each group: equal rewards, groups of one, any order, any ids."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Literal

import pytest
import torch

import fstep
import fstep.testing

F64 = torch.float64
Baseline = Literal["mean", "others"] | None
Scale = Literal["group", "batch"] | None
GROUPS = [7, -3, 7, 7, 10**12, -3, 4, 4, 4]
REWARDS = [1.0, 0.3, -0.5, 2.0, 5.0, 0.1, 0.1, 0.1, 0.1]


def oracle(baseline: Baseline, scale: Scale, eps: float) -> list[float]:
    out = []
    for i, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        group = [x for x, h in zip(REWARDS, GROUPS, strict=True) if h == g]
        others = [x for j, (x, h) in enumerate(zip(REWARDS, GROUPS, strict=True)) if h == g and j != i]
        mean = {"mean": statistics.mean(group), "others": statistics.mean(others) if others else r, None: 0.0}[baseline]
        spread = {
            "group": statistics.stdev(group) if others else 0.0,
            "batch": statistics.stdev(REWARDS),
            None: 1.0 - eps,
        }[scale]
        out.append((r - mean) / (spread + eps))
    return out


EVERY = [*itertools.product(["mean", "others"], ["group", "batch", None]), (None, None)]


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
def test_by_statistics(baseline: Baseline, scale: Scale) -> None:
    rewards, groups = torch.tensor(REWARDS, dtype=F64), torch.tensor(GROUPS)
    found = fstep.testing.assert_pure(fstep.group_advantages, rewards, groups, baseline=baseline, scale=scale, eps=1e-3)
    assert found.tolist() == pytest.approx(oracle(baseline, scale, 1e-3), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("baseline", ["mean", "others"])
@pytest.mark.parametrize("scale", ["group", "batch", None])
def test_equal_rewards_and_groups_of_one_are_exactly_0(baseline: Baseline, scale: Scale, dtype: torch.dtype) -> None:
    # The mean of three 0.1 is not 0.1, in either precision.
    rewards = torch.tensor([-7.3, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7], dtype=dtype).requires_grad_()
    groups = torch.tensor([2, 1, 1, 1, 3, 3, 3, 3, 3, 3])
    found = fstep.group_advantages(rewards, groups, baseline=baseline, scale=scale)
    assert found.tolist() == [0] * 10
    assert torch.autograd.grad(found.sum(), rewards)[0].isfinite().all()


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
def test_no_documents(baseline: Baseline, scale: Scale) -> None:
    none = torch.zeros(0)
    assert fstep.group_advantages(none, none.long(), baseline=baseline, scale=scale).shape == (0,)


def test_whole_rewards_and_flags_become_float32() -> None:
    groups = torch.tensor([0, 0])
    for rewards in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0], dtype=torch.bfloat16)):
        found = fstep.group_advantages(rewards, groups, scale=None)
        assert found.dtype == torch.float32 and found.tolist() == [0.5, -0.5]


def test_whiten_by_statistics() -> None:
    values, weights = [1.0, 4.0, -2.0, math.nan], [1.0, 2.0, 1.0, 0.0]
    found = fstep.testing.assert_pure(
        fstep.whiten, torch.tensor(values, dtype=F64), torch.tensor(weights, dtype=F64), eps=1e-3
    )
    sample = [1.0, 4.0, 4.0, -2.0]
    mean, variance = statistics.mean(sample), statistics.pvariance(sample)
    want = [(x - mean) / math.sqrt(variance + 1e-3) for x in values[:3]]
    assert found.tolist() == pytest.approx([*want, 0], rel=1e-13)
    assert fstep.whiten(torch.tensor([math.nan]), torch.zeros(1)).tolist() == [0]
    assert fstep.whiten(torch.zeros(3), torch.ones(3)).tolist() == [0, 0, 0]


def test_whiten_over_ranks() -> None:
    values, weights = torch.randn(10, dtype=F64), torch.rand(10, dtype=F64)
    cotangent = torch.randn(10, dtype=F64)

    def f(mesh: fstep.Mesh) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(0, 7) if mesh.dp.rank == 0 else slice(7, 10)
        x = values[own].clone().requires_grad_()
        y = fstep.whiten(x, weights[own], axis=mesh.dp)
        return y.detach(), torch.autograd.grad(y @ cotangent[own], x)[0]

    parts = fstep.simulate(f, dp=2)
    x = values.clone().requires_grad_()
    y = fstep.whiten(x, weights)
    fstep.testing.assert_trees_close(torch.cat([p[0] for p in parts]), y.detach(), rtol=1e-13)
    expected = torch.autograd.grad(y @ cotangent, x)[0]
    fstep.testing.assert_trees_close(torch.cat([p[1] for p in parts]), expected, rtol=1e-12)


def test_what_does_not_fit_is_named() -> None:
    x, groups = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\), groups \(1,\); one of each a document"):
        fstep.group_advantages(x, groups[:1])
    with pytest.raises(TypeError, match=r"groups are torch\.float32; pass integers"):
        fstep.group_advantages(x, x)
    with pytest.raises(ValueError, match="baseline is 'median'; pass"):
        fstep.group_advantages(x, groups, baseline="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale is 'std'; pass"):
        fstep.group_advantages(x, groups, scale="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale is 'group' without a baseline, and equal rewards"):
        fstep.group_advantages(x, groups, baseline=None)
