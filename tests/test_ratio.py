"""A Ratio adds sums and weights, divides once, and has mean and gradient 0 where it has no weight."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import fstep
from fstep import Ratio


def ratio(num: float, den: float) -> Ratio:
    return Ratio(torch.tensor(num, dtype=torch.float64), torch.tensor(den, dtype=torch.float64))


def test_sum_is_sum_over_sum() -> None:
    # (12 + 2 + 7) / (4 + 1 + 2) = 3; the mean of the means would be (3 + 2 + 3.5) / 3.
    parts = [ratio(12, 4), ratio(2, 1), ratio(7, 2)]
    total = sum(parts)
    assert isinstance(total, Ratio)
    assert (float(total.num), float(total.den), float(total.mean())) == (21.0, 7.0, 3.0)
    assert sum(parts, ratio(0, 0)) == total


def test_any_grouping_gives_one_result() -> None:
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(-50, 50, (30, 2), generator=g).tolist()
    exact = Fraction(sum(n for n, _ in numbers), sum(abs(d) for _, d in numbers))
    parts = [ratio(n, abs(d)) for n, d in numbers]
    for cut in (1, 7, 29):
        assert float((sum(parts[:cut]) + sum(parts[cut:])).mean()) == float(exact)


def test_no_weight_has_mean_and_gradient_zero() -> None:
    for value in (0.0, 5.0, float("inf"), float("nan")):
        num, den = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (value, 0.0))
        mean = Ratio(num, den).mean()
        assert mean == 0 and mean.dtype == torch.float64
        assert torch.autograd.grad(mean, (num, den)) == (0, 0)


def test_gradient_of_the_mean() -> None:
    # d(n/d)/dn = 1/d and d(n/d)/dd = -n/d^2
    num, den = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    assert torch.autograd.grad(Ratio(num, den).mean(), (num, den)) == (0.25, -0.1875)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("den", [0, 4])
def test_mean_keeps_the_dtype_of_the_sum(dtype: torch.dtype, den: int) -> None:
    assert Ratio(torch.tensor(3.0, dtype=dtype), torch.tensor(den)).mean().dtype == dtype
    assert Ratio(torch.tensor(3.0, dtype=dtype), torch.tensor(den, dtype=dtype)).mean().dtype == dtype


def test_mean_of_counts() -> None:
    assert Ratio(torch.tensor(3), torch.tensor(4)).mean() == 0.75


def test_many_at_once_under_vmap() -> None:
    many = Ratio(torch.tensor([6.0, 5.0]), torch.tensor([3.0, 0.0]))
    assert torch.func.vmap(lambda r: (r + r).mean())(many).tolist() == [2.0, 0.0]


def test_detach_cuts_the_graph_of_both() -> None:
    x = torch.tensor(1.0, requires_grad=True)
    assert (Ratio(x * 2, x * 3).num.requires_grad, Ratio(x * 2, x * 3).den.requires_grad) == (True, True)
    cut = Ratio(x * 2, x * 3).detach()
    assert not cut.num.requires_grad and not cut.den.requires_grad and (cut.num, cut.den) == (2, 3)


@pytest.mark.parametrize("other", [1, 0.0, torch.tensor(0.0), None, (1, 2)])
def test_adds_to_nothing_but_a_ratio(other: object) -> None:
    with pytest.raises(TypeError):
        ratio(1, 1) + other  # type: ignore[operator]
    with pytest.raises(TypeError):
        other + ratio(1, 1)  # type: ignore[operator]


def test_is_a_tree_of_two_leaves() -> None:
    assert fstep.tree_paths({"loss": ratio(1, 2)}) == ["loss.num", "loss.den"]
