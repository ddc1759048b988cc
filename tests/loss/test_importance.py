"""Ratios of sequences against loops over documents, and the corners of the correction for another generator."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

import fstep
import fstep.testing

F64 = torch.float64
DOCS = fstep.make_docs(
    [[1, 2, 3, 4], [5, 6], [7], [8, 9, 1]], weights=[[0, 0, 1, 0.5], [0, 1], [1], [0, 0, 0]]
)  # two tokens, one, none to be predicted, none that counts
LOG_RATIO = torch.tensor([9.0, math.nan, 0.2, -0.5, -math.inf, 0.3, math.inf, 1.0, 2.0, 3.0], dtype=F64)


@pytest.mark.parametrize("mean", [True, False])
def test_sequence_log_ratio_by_hand(mean: bool) -> None:
    x = LOG_RATIO.clone().requires_grad_()
    found = fstep.testing.assert_pure(fstep.cp_sequence_log_ratio, x, DOCS, mean=mean)
    first = -0.3 / 2 if mean else -0.3
    assert found.tolist() == pytest.approx([first] * 4 + [0.3] * 2 + [0] * 4, rel=1e-14)
    (g,) = torch.autograd.grad(found @ torch.arange(1.0, 11, dtype=F64), x)
    each = (1 + 2 + 3 + 4) / (2 if mean else 1)
    assert g.tolist() == [0, 0, each, each, 0, 5 + 6, 0, 0, 0, 0]


def test_gspo_by_hand() -> None:
    # -1/documents sum of min(s A, clip(s) A), s the geometric mean of an answer's ratios, for three answers.
    ratios, advantages = [[1.1, 1.2, 0.9], [1.5], [0.5, 0.6]], [1.0, 1.0, -1.0]
    docs = fstep.make_docs([[0] * (len(r) + 1) for r in ratios], targets={"r": [[math.nan, *r] for r in ratios]})
    a = fstep.spread_documents(torch.tensor(advantages, dtype=F64), docs)
    x = docs.targets["r"].double().log().requires_grad_()
    weights = fstep.document_weights(docs).double()
    loss, metrics = fstep.clipped_loss(fstep.cp_sequence_log_ratio(x, docs), a, weights, low=0.2, high=0.28)
    s = (1.1 * 1.2 * 0.9) ** (1 / 3)
    assert loss.num.item() == pytest.approx(-(s + 1.28 - 0.8), rel=1e-6) and loss.den.item() == pytest.approx(3)
    (g,) = torch.autograd.grad(loss.num, x)
    assert g.tolist() == pytest.approx([0] + [-s / 3] * 3 + [0] * 5, rel=1e-6)
    assert metrics["clip_high"].mean().item() == metrics["clip_low"].mean().item() == pytest.approx(1 / 3)


def test_importance_by_hand() -> None:
    ratios = [0.1, 0.5, 0.9, 2.0, 7.0]
    x = torch.tensor([*ratios, math.nan], dtype=F64).log().requires_grad_()
    weights = torch.tensor([1.0, 1, 1, 1, 4, 0], dtype=F64)
    edge = x[3].exp().item(), x[1].exp().item()
    cases: dict[tuple[float, float, Literal["clip", "zero"]], list[float]] = {
        (0.0, edge[0], "clip"): [0.1, 0.5, 0.9, 2.0, 2.0],  # TIS
        (edge[1], edge[0], "clip"): [0.5, 0.5, 0.9, 2.0, 2.0],
        (edge[1], edge[0], "zero"): [0.0, 0.5, 0.9, 2.0, 0.0],  # IcePop: bounds belong to the inside
        (0.0, math.inf, "zero"): ratios,
    }
    for (low, high, outside), want in cases.items():
        factor, metrics = fstep.testing.assert_pure(
            fstep.importance_weights, x, weights, low=low, high=high, outside=outside
        )
        assert factor[:5].tolist() == pytest.approx(want, rel=1e-14) and factor[5].isfinite()
        assert not factor.requires_grad
        means = {name: r.mean().item() for name, r in metrics.items()}
        mean = (sum(want[:4]) + 4 * want[4]) / 8
        below, above = (1 / 8 if low else 0.0), (0.5 if high < 7 else 0.0)
        assert means == pytest.approx({"importance": mean, "importance_low": below, "importance_high": above})
        assert {r.den.item() for r in metrics.values()} == {8}


def test_importance_of_sequences() -> None:
    log_ratio = fstep.cp_sequence_log_ratio(LOG_RATIO * 10, DOCS, mean=False)  # -3 and 3
    factor, _ = fstep.importance_weights(log_ratio, DOCS.weights, high=2.0)
    assert factor[[2, 3, 5]].tolist() == pytest.approx([math.exp(-3), math.exp(-3), 2.0])
    factor, _ = fstep.importance_weights(log_ratio, DOCS.weights, high=2.0, outside="zero")
    assert factor[[2, 3, 5]].tolist() == pytest.approx([math.exp(-3), math.exp(-3), 0.0])
    # A product of many ratios overflows, and is truncated all the same.
    huge = fstep.importance_weights(torch.tensor([1000.0]), torch.ones(1))[0]
    assert huge.item() == 2 and fstep.importance_weights(torch.tensor([math.nan]), torch.ones(1), outside="zero")[0].isnan()


def test_extremes() -> None:
    x = torch.tensor([0.5, 3.0, 2.0, math.nan], dtype=F64).log()
    low, high = fstep.ratio_extremes(x, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert [low.item(), high.item()] == pytest.approx([0.5, 2.0])
    assert [v.item() for v in fstep.ratio_extremes(x, torch.zeros(4))] == [1, 1]
    assert [v.item() for v in fstep.ratio_extremes(x[:0], torch.zeros(0))] == [1, 1]
    low, high = fstep.ratio_extremes(x[:1], torch.ones(1))
    assert low.item() == high.item() == pytest.approx(0.5)


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(10)
    with pytest.raises(ValueError, match="importance_weights: low is 3 and high is 2"):
        fstep.importance_weights(x, x, low=3, high=2)
    with pytest.raises(ValueError, match='outside is \'drop\'; pass "clip" or "zero"'):
        fstep.importance_weights(x, x, outside="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cp_sequence_log_ratio: log_ratio has shape \(3,\) for 10 tokens"):
        fstep.cp_sequence_log_ratio(x[:3], DOCS)

    def forgets_the_axis(mesh: fstep.Mesh) -> None:
        part = fstep.cp_shard(fstep.pack_thd(DOCS, multiple_of=4), axis=mesh.cp)
        fstep.cp_sequence_log_ratio(part.weights, part)

    with pytest.raises(ValueError, match="batch is one of 2 shards and axis 'cp' has 1 ranks"):
        fstep.simulate(forgets_the_axis, cp=2)
    with pytest.raises(ValueError, match="batch is whole and axis 'cp' has 2 ranks"):
        fstep.simulate(lambda mesh: fstep.cp_sequence_log_ratio(x, DOCS, axis=mesh.cp), cp=2)
