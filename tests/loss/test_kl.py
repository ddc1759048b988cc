"""The estimators over a whole distribution, where means are sums: which value and which gradient is that of the KL."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing

F64 = torch.float64
Estimator = Literal["k1", "k2", "k3"]
Z = torch.tensor([0.3, -0.4, 1.1, -2.0], dtype=F64)  # the policy's logits
REF = torch.tensor([-0.2, 0.5, 0.1, 0.0], dtype=F64).log_softmax(0)
OLD = torch.tensor([0.1, 0.1, 0.6, -1.0], dtype=F64).log_softmax(0)


def exact(z: Tensor, forward: bool = False) -> tuple[Tensor, Tensor]:
    """Return KL(policy, ref), or KL(ref, policy), and its gradient."""
    z = z.clone().requires_grad_()
    p = z.log_softmax(0)
    kl = (REF.exp() * (REF - p)).sum() if forward else (p.exp() * (p - REF)).sum()
    return kl.detach(), torch.autograd.grad(kl, z)[0]


def estimate(estimator: Estimator, drawn_from: Tensor, ratio: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean, over what is drawn, of the estimator and of its gradient."""
    z = Z.clone().requires_grad_()
    p = z.log_softmax(0)
    loss = fstep.kl_loss(p, REF, drawn_from.exp(), estimator=estimator, log_ratio=p - drawn_from if ratio else None)
    return loss.mean().detach(), torch.autograd.grad(loss.num, z)[0]


def test_values_drawn_from_the_policy() -> None:
    kl, _ = exact(Z)
    policy = Z.log_softmax(0)
    estimators: tuple[Estimator, ...] = ("k1", "k3")
    for estimator in estimators:
        fstep.testing.assert_trees_close(estimate(estimator, policy)[0], kl, rtol=1e-14)
    assert 0.5 < float(estimate("k2", policy)[0] / kl) < 2


def test_gradients_drawn_from_the_policy() -> None:
    policy = Z.log_softmax(0)
    fstep.testing.assert_trees_close(estimate("k1", policy)[1], torch.zeros(4, dtype=F64), atol=1e-15)
    fstep.testing.assert_trees_close(estimate("k2", policy)[1], exact(Z)[1], rtol=1e-13)
    fstep.testing.assert_trees_close(estimate("k3", policy)[1], exact(Z, forward=True)[1], rtol=1e-13)
    assert (exact(Z)[1] - exact(Z, forward=True)[1]).norm() > 0.1  # which are two different things


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("drawn_from", [OLD, Z.log_softmax(0)], ids=["old", "policy"])
def test_with_the_ratio_value_and_gradient_are_right(estimator: Estimator, drawn_from: Tensor) -> None:
    value, gradient = estimate(estimator, drawn_from, ratio=True)
    fstep.testing.assert_trees_close(value, exact(Z)[0], rtol=1e-13)
    fstep.testing.assert_trees_close(gradient, exact(Z)[1], rtol=1e-13)
    assert (estimate(estimator, OLD)[1] - exact(Z)[1]).norm() > 0.05  # and without it they are not


def test_k1_as_a_reward_has_the_right_policy_gradient() -> None:
    z = Z.clone().requires_grad_()
    p = z.log_softmax(0)
    loss = fstep.reinforce_loss(p, -(p - REF), p.detach().exp())
    fstep.testing.assert_trees_close(torch.autograd.grad(loss.num, z)[0], exact(Z)[1], rtol=1e-13)


def test_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -math.inf], dtype=F64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5, -math.inf], dtype=F64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=F64)
    d = [0.5, -1.0, 0.0]
    want: dict[Estimator, tuple[float, list[float]]] = {
        "k1": (0.5 - 2, [1.0, 2.0, 1.0, 0.0]),
        "k2": (0.125 + 1, [0.5, -2.0, 0.0, 0.0]),
        "k3": (math.exp(-0.5) - 0.5 + 2 * (math.e - 2), [1 - math.exp(-0.5), 2 - 2 * math.e, 0.0, 0.0]),
    }
    for estimator, (num, slopes) in want.items():
        loss = fstep.testing.assert_pure(fstep.kl_loss, logprobs, ref, weights, estimator=estimator)
        assert loss.num.item() == pytest.approx(num, rel=1e-14) and loss.den == 4
        g, none = torch.autograd.grad(loss.num, (logprobs, ref), allow_unused=True)
        assert g.tolist() == pytest.approx(slopes, rel=1e-14) and none is None
    log_ratio = torch.tensor([0.1, 0.2, -0.3, math.nan], dtype=F64, requires_grad=True)
    loss = fstep.kl_loss(logprobs, ref, weights, estimator="k1", log_ratio=log_ratio)
    terms = [w * x * math.exp(r) for w, x, r in zip((1, 2, 1), d, (0.1, 0.2, -0.3), strict=True)]
    assert loss.num.item() == pytest.approx(sum(terms), rel=1e-14)
    assert torch.autograd.grad(loss.num, log_ratio)[0].tolist() == pytest.approx([*terms, 0], rel=1e-14)


@pytest.mark.parametrize(("bound", "cap"), [(2.0, None), (None, 3.0), (4.0, 3.0), (20.0, 10.0), (None, None)])
def test_clamps_of_k3(bound: float | None, cap: float | None) -> None:
    d = torch.tensor([-30.0, -5.0, -2.0, -0.1, 0.1, 2.0, 3.5, 30.0], dtype=F64, requires_grad=True)
    ones = torch.ones(8, dtype=F64)
    loss = fstep.kl_loss(d, torch.zeros(8, dtype=F64), ones, bound=bound, cap=cap)
    values, slopes = [], []
    for x in d.tolist():
        at = x if bound is None else min(max(x, -bound), bound)
        k = math.exp(-at) - 1 + at
        free = (bound is None or abs(x) <= bound) and (cap is None or k <= cap)  # on the bound it is there
        values.append(k if cap is None else min(k, cap))
        slopes.append(1 - math.exp(-x) if free else 0.0)
    assert loss.num.item() == pytest.approx(sum(values), rel=1e-13)
    (g,) = torch.autograd.grad(loss.num, d)
    fstep.testing.assert_trees_close(g, torch.tensor(slopes, dtype=F64), rtol=1e-13)
    assert (g[torch.tensor(slopes) == 0] == 0).all()


def test_the_cap_holds_where_the_exponential_overflows() -> None:
    """exp(119) is infinite in float32, and 0 times its gradient would be NaN."""
    logprobs, ref = torch.tensor([-120.0, -0.7], requires_grad=True), torch.tensor([-0.5, -0.5])
    loss = fstep.kl_loss(logprobs, ref, torch.ones(2), bound=None, cap=10.0)
    assert loss.num.item() == pytest.approx(10 + math.exp(0.2) - 1.2, rel=1e-6)
    (g,) = torch.autograd.grad(loss.num, logprobs)
    assert g[0] == 0
    assert g[1].item() == pytest.approx(1 - math.exp(0.2), rel=1e-5)


def test_k3_of_a_small_difference_is_not_rounded_away() -> None:
    d = 2.0**-14
    loss = fstep.kl_loss(torch.tensor([d]), torch.zeros(1), torch.ones(1))
    assert loss.num.item() == pytest.approx(d * d / 2, rel=0.01)


def test_far_away_is_finite() -> None:
    logprobs = torch.tensor([-200.0, -1.0], requires_grad=True)
    loss = fstep.kl_loss(logprobs, torch.tensor([-1.0, -math.inf]), torch.ones(2))
    assert loss.num.isfinite() and torch.autograd.grad(loss.num, logprobs)[0].tolist() == [0, 0]


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="kl_loss: estimator is 'k4'; pass one of k1, k2, k3"):
        fstep.kl_loss(x, x, x, estimator="k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl_loss: bound is 0; pass a positive number, or None"):
        fstep.kl_loss(x, x, x, bound=0)
    with pytest.raises(ValueError, match="kl_loss: cap is 3 and limits k3 only"):
        fstep.kl_loss(x, x, x, estimator="k2", cap=3)
    with pytest.raises(ValueError, match=r"kl_loss: log_ratio has shape \(3,\)"):
        fstep.kl_loss(x, x, x, log_ratio=torch.zeros(3))
