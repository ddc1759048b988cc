"""Which documents are compared: pairs in any order, and what is no pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from tests.loss.test_preference import CHOSEN, PAIR, ROWS, sums


def test_pairs_are_found_in_any_order() -> None:
    pairs = fstep.testing.assert_pure(fstep.find_pairs, PAIR, CHOSEN)
    assert list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == ROWS
    again = fstep.find_pairs(PAIR, CHOSEN.to(torch.float32))
    assert torch.equal(again.chosen, pairs.chosen) and pairs.weights.tolist() == [1, 1, 1]
    huge = fstep.find_pairs(PAIR + 2**62, CHOSEN)
    assert torch.equal(huge.chosen, pairs.chosen) and torch.equal(huge.rejected, pairs.rejected)


@pytest.mark.parametrize(
    ("pair", "chosen", "message"),
    [
        ([1, 1, 2], [1, 0, 1], "3 documents are no pairs of two; keep pairs in one part, with split_microbatches"),
        ([1, 2], [1, 0], r"pair 1 has 1 documents here, chosen=\[True\]; it needs one chosen and one rejected; keep pairs"),
        ([3, 3], [1, 1], r"pair 3 has 2 documents here, chosen=\[True, True\]"),
        ([3, 3], [0, 0], r"pair 3 has 2 documents here, chosen=\[False, False\]"),
        ([3, 3, 3, 3], [1, 0, 1, 0], "pair 3 has 4 documents here"),
        ([[3, 3]], [[1, 0]], r"pair is \(1, 2\), chosen \(1, 2\); give one entry a document"),
        ([3, 3], [1], r"pair is \(2,\), chosen \(1,\)"),
    ],
)
def test_what_is_no_pair_is_refused(pair: list[int], chosen: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^find_pairs: {message}"):
        fstep.find_pairs(torch.tensor(pair), torch.tensor(chosen))


def test_where_nobody_looks_a_broken_pair_is_not_finite() -> None:
    # As on a GPU, where looking would wait: under vmap nothing can be looked at either.
    def f(chosen: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = fstep.dpo_loss(sums(), fstep.find_pairs(PAIR, chosen), beta=0.1)
        return loss.num, loss.den

    num, den = torch.func.vmap(f)(torch.stack([CHOSEN, ~CHOSEN, torch.ones_like(CHOSEN)]))
    assert num[:2].isfinite().all() and num[2].isnan() and den[2].isnan()
