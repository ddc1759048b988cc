"""Generalised advantages against a loop from the end of each document, and the value loss against plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing

F64 = torch.float64
LENGTHS = [9, 1, 2, 33, 4, 5]


def documents(seed: int = 0) -> fstep.Docs:
    """Prompts, holes inside answers, a document of one token, one that counts nowhere; NaN wherever nothing counts."""
    key = fstep.Key.seed(seed)
    weights = [key.fold_in(i).uniform((n,), dtype=F64) for i, n in enumerate(LENGTHS)]
    weights = [torch.where(w > 0.3, w, 0) for w in weights]
    weights[3][-3:] = 0  # ends in what does not count
    weights[4][:] = 0
    docs = fstep.make_docs([[1] * n for n in LENGTHS], weights=weights)
    noise = {k: key.fold_in(100 + i).normal((sum(LENGTHS),), dtype=F64) for i, k in enumerate(("r", "v"))}
    targets = {k: x.masked_fill(docs.weights == 0, math.nan) for k, x in noise.items()}
    return fstep.make_docs(
        [[1] * n for n in LENGTHS],
        weights=weights,
        targets={k: torch.split(x, LENGTHS) for k, x in targets.items()},
        per_document={"end": key.fold_in(7).normal((len(LENGTHS),), dtype=F64)},
    )


def oracle(docs: fstep.Docs, gamma: float, lam: float, bootstrap: bool) -> tuple[Tensor, Tensor]:
    """Go from the end of each document to its start, one token after the other."""
    advantages, returns = torch.zeros_like(docs.weights), torch.zeros_like(docs.weights)
    start = 0
    for i, n in enumerate(LENGTHS):
        value_next = float(docs.per_document["end"][i]) if bootstrap else 0.0
        later = 0.0
        for t in reversed(range(start, start + n)):
            if docs.weights[t] == 0:
                continue
            value = float(docs.targets["v"][t])
            later = float(docs.targets["r"][t]) + gamma * value_next - value + gamma * lam * later
            advantages[t], returns[t] = later, later + value
            value_next = value
        start += n
    return advantages, returns


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0), (0.99, 1.0)])
def test_gae_by_loops(gamma: float, lam: float, bootstrap: bool) -> None:
    docs = documents()
    end = docs.per_document["end"] if bootstrap else None
    found = fstep.testing.assert_pure(
        fstep.gae, docs.targets["r"], docs.targets["v"], docs, gamma=gamma, lam=lam, bootstrap=end
    )
    fstep.testing.assert_trees_close(found, oracle(docs, gamma, lam, bootstrap), rtol=1e-13)


@pytest.mark.parametrize("multiple_of", [1, 4, 7])
def test_gae_of_a_packed_row(multiple_of: int) -> None:
    docs = documents()
    packed = fstep.pack_thd(docs, multiple_of=multiple_of, length=multiple_of * 60)
    end = packed.per_document["end"]
    found = fstep.gae(packed.targets["r"], packed.targets["v"], packed, gamma=0.9, lam=0.8, bootstrap=end)
    expected = oracle(docs, 0.9, 0.8, True)
    # Place t of the row is about token t+1: what belongs to a document stands in order, zeros where nothing counts.
    for ours, whole in zip(found, expected, strict=True):
        fstep.testing.assert_trees_close(ours[packed.weights != 0], whole[docs.weights != 0], rtol=1e-13)
        assert (ours[packed.weights == 0] == 0).all()


def test_gae_by_hand() -> None:
    docs = fstep.make_docs([[1, 2, 3]])
    r, v = torch.tensor([9.0, 1.0, 10.0], dtype=F64), torch.tensor([9.0, 0.5, 0.25], dtype=F64)
    end = torch.tensor([4.0], dtype=F64)
    advantages, returns = fstep.gae(r, v, docs, gamma=0.5, lam=0.5, bootstrap=end)
    last = 10 + 0.5 * 4 - 0.25
    assert advantages.tolist() == [0, 1 + 0.5 * 0.25 - 0.5 + 0.25 * last, last]
    assert returns.tolist() == [0, advantages[1].item() + 0.5, 12]


def test_gae_of_gamma_and_lambda_1_is_the_reward_to_come_minus_the_value() -> None:
    docs = fstep.make_docs([[1] * 2000])
    r, v = torch.randn(2000, dtype=F64), torch.randn(2000, dtype=F64)
    advantages, returns = fstep.gae(r, v, docs)
    to_come = r.flip(0).cumsum(0).flip(0)
    fstep.testing.assert_trees_close(returns[1:], to_come[1:], rtol=1e-13)
    fstep.testing.assert_trees_close(advantages[1:], (to_come - v)[1:], rtol=1e-13)


def test_gae_of_nothing() -> None:
    docs = fstep.make_docs([])
    assert [x.shape for x in fstep.gae(torch.zeros(0), torch.zeros(0), docs, bootstrap=torch.zeros(0))] == [(0,), (0,)]
    row = fstep.pack_thd(docs, length=4)
    found = fstep.gae(torch.full((4,), math.nan), torch.full((4,), math.nan), row, bootstrap=torch.zeros(0))
    assert [x.tolist() for x in found] == [[0] * 4] * 2


def test_value_loss_by_hand() -> None:
    # moved too far and away; too far and over the mark; too far the wrong way; near; nothing that counts
    values = torch.tensor([1.0, 3.0, -1.0, 0.1, math.nan], dtype=F64, requires_grad=True)
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, math.inf], dtype=F64)
    returns = torch.tensor([2.0, 1.4, 2.0, 2.0, -math.inf], dtype=F64)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0], dtype=F64)
    plain, _ = fstep.testing.assert_pure(fstep.value_loss, values, returns, weights)
    assert plain.num.item() == pytest.approx((1 + 2 * 2.56 + 9 + 3.61) / 2, rel=1e-14) and plain.den == 5
    assert torch.autograd.grad(plain.num, values)[0].tolist() == pytest.approx([-1, 3.2, -3, -1.9, 0], rel=1e-14)
    loss, metrics = fstep.value_loss(values, returns, weights, old_values=old, clip=0.5)
    # near: 0.5, 0.5, -0.5, 0.1, whose errors are 1.5, 0.9, 2.5, 1.9; the larger of each counts
    assert loss.num.item() == pytest.approx((2.25 + 2 * 2.56 + 9 + 3.61) / 2, rel=1e-14)
    assert torch.autograd.grad(loss.num, values)[0].tolist() == pytest.approx([0, 3.2, -3, -1.9, 0], rel=1e-14)
    means = {name: ratio.mean().item() for name, ratio in metrics.items()}
    want = {
        "value_clip": 0.2,
        "value_error": (1 + 2 * 2.56 + 9 + 3.61) / 5,
        "returns": (2 + 2.8 + 2 + 2) / 5,
        "returns_square": (4 + 2 * 1.96 + 4 + 4) / 5,
    }
    assert means == pytest.approx(want, rel=1e-14)


def test_on_the_value_bound_the_gradient_is_still_there() -> None:
    values = torch.tensor([0.5, -0.5], dtype=F64, requires_grad=True)
    returns, zero = torch.tensor([2.0, -2.0], dtype=F64), torch.zeros(2, dtype=F64)
    loss, metrics = fstep.value_loss(values, returns, zero + 1, old_values=zero, clip=0.5)
    assert torch.autograd.grad(loss.num, values)[0].tolist() == [-1.5, 1.5] and metrics["value_clip"].num == 0


def test_returns_and_old_values_are_constants() -> None:
    v, r, old = (torch.tensor([x], dtype=F64, requires_grad=True) for x in (0.1, 2.0, 0.0))
    loss, _ = fstep.value_loss(v, r, torch.ones(1), old_values=old, clip=0.5)
    assert all(g is None for g in torch.autograd.grad(loss.num, (r, old), allow_unused=True))


def test_what_does_not_fit_is_named() -> None:
    docs, x = fstep.make_docs([[1, 2]]), torch.zeros(2)
    with pytest.raises(ValueError, match=r"gae: gamma is 1\.5; pass a number from 0 to 1"):
        fstep.gae(x, x, docs, gamma=1.5)
    with pytest.raises(ValueError, match=r"gae: values has shape \(1,\) for 2 tokens"):
        fstep.gae(x, x[:1], docs)
    with pytest.raises(ValueError, match=r"gae: bootstrap has shape \(2,\) for 1 documents"):
        fstep.gae(x, x, docs, bootstrap=x)
    with pytest.raises(ValueError, match="value_loss: of clip and old_values only one is given"):
        fstep.value_loss(x, x, x, clip=0.1)
    with pytest.raises(ValueError, match="value_loss: clip is 0; pass a positive number"):
        fstep.value_loss(x, x, x, old_values=x, clip=0)

    def shard(mesh: fstep.Mesh) -> None:
        part = fstep.cp_shard(fstep.pack_thd(docs, multiple_of=4), axis=mesh.cp)
        fstep.gae(part.weights, part.weights, part)

    with pytest.raises(ValueError, match="gae: batch is one of 2 shards, in which no document is whole"):
        fstep.simulate(shard, cp=2)
