"""The loss against hand arithmetic and torch's cross entropy: value, gradient, masks, infinities and precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import fstep
import fstep.testing


def numbers(loss: fstep.Ratio) -> tuple[float, float, float]:
    return loss.num.item(), loss.den.item(), loss.mean().item()


def test_by_hand() -> None:
    logp = torch.tensor([-1.0, -3.0, -0.5, -8.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    loss = fstep.testing.assert_pure(fstep.sft_loss, logp, weights)
    # 1 * 1 + 0.5 * 3 + 2 * 0.5 = 3.5 over 1 + 0.5 + 2
    assert numbers(loss) == (3.5, 3.5, 1.0)
    (g,) = torch.autograd.grad(loss.num, logp)
    assert g.tolist() == [-1, -0.5, -2, 0]


def test_is_torchs_cross_entropy() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (9,), generator=g)
    labels[[2, 7]] = -100
    weights = (labels != -100).double()
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    loss = fstep.sft_loss(logp, weights)
    expected = cross_entropy(logits, labels, reduction="sum")
    assert loss.num.item() == pytest.approx(expected.item(), rel=1e-14) and loss.den.item() == 7
    assert loss.mean().item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-14)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss.num, expected))
    fstep.testing.assert_trees_close(ours, theirs, rtol=1e-14)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_a_masked_value_does_no_harm_to_value_or_gradient(value: float) -> None:
    logp = torch.tensor([-1.0, value], requires_grad=True)
    loss = fstep.sft_loss(logp, torch.tensor([1.0, 0.0]))
    assert numbers(loss) == (1, 1, 1)
    assert torch.autograd.grad(loss.num, logp)[0].tolist() == [-1, 0]


def test_a_counted_value_that_is_not_finite_shows() -> None:
    assert not fstep.sft_loss(torch.tensor([-torch.inf]), torch.tensor([1.0])).num.isfinite()


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_learn_has_loss_and_gradient_zero(n: int) -> None:
    logp = torch.full((n,), -2.0, requires_grad=True)
    loss = fstep.sft_loss(logp, torch.zeros(n))
    assert numbers(loss) == (0, 0, 0)
    assert torch.autograd.grad(loss.num, logp)[0].tolist() == [0] * n


def test_parts_add_up_to_the_whole() -> None:
    logp, weights = torch.randn(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    parts = [fstep.sft_loss(logp[a:b], weights[a:b]) for a, b in ((0, 1), (1, 1), (1, 7), (7, 10))]
    fstep.testing.assert_trees_close(sum(parts[1:], parts[0]), fstep.sft_loss(logp, weights), rtol=1e-14)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32_at_least(low: torch.dtype) -> None:
    # 2000 ones: bfloat16 has 8 digits and would count 2000; 70001 would be 70144, and in float16 infinite.
    for n in (2001, 70_001):
        loss = fstep.sft_loss(torch.full((n,), -1.0, dtype=low), torch.ones(n, dtype=low))
        assert loss.num.dtype == loss.den.dtype == torch.float32
        assert numbers(loss) == (n, n, 1)
    assert fstep.sft_loss(torch.zeros(2), torch.ones(2, dtype=torch.float64)).den.dtype == torch.float64
    assert fstep.sft_loss(torch.zeros(2), torch.ones(2)).num.dtype == torch.float32


def test_weights_may_be_whole_numbers_or_flags() -> None:
    for weights in (torch.tensor([1, 0]), torch.tensor([True, False])):
        assert fstep.sft_loss(torch.tensor([-2.0, -5.0]), weights).mean() == 2


def test_shapes_have_to_agree() -> None:
    with pytest.raises(ValueError, match=r"sft_loss: logprobs have shape \(3,\), weights \(1,\); give one weight a token"):
        fstep.sft_loss(torch.zeros(3), torch.ones(1))
