"""Documents that stay together: in one microbatch, on one rank, under the budget, whatever the cut."""

from __future__ import annotations

import pytest
import torch

import fstep
from fstep import Docs, Mesh

LENGTHS = [5, 9, 3, 2, 7, 4, 6, 3]
PAIR = [3, 5, 8, 3, 5, 8, 6, 6]


def make() -> Docs:
    tokens = [[i] * n for i, n in enumerate(LENGTHS)]
    return fstep.make_docs(tokens, per_document={"pair": PAIR})


@pytest.mark.parametrize(
    "cut", [{"num": 1}, {"num": 3}, {"num": 9}, {"max_tokens": 16}, {"max_tokens": 24, "multiple_of": 4}]
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pairs_stay_together(cut: dict[str, int], ranks: int) -> None:
    docs = make()
    together = docs.per_document["pair"]
    ranked = fstep.simulate(lambda m: fstep.split_microbatches(docs, axis=m.dp, together=together, **cut), dp=ranks)
    assert len({len(parts) for parts in ranked}) == 1
    for part in (p for parts in ranked for p in parts):
        numbers = part.per_document["pair"].tolist()
        assert all(numbers.count(n) == 2 for n in numbers) and part.index.tolist() == sorted(part.index.tolist())
        padded = sum(-(-n // cut.get("multiple_of", 1)) * cut.get("multiple_of", 1) for n in part.lengths.tolist())
        assert padded <= cut.get("max_tokens", 99)
    joined = fstep.join_documents([p for parts in ranked for p in parts])
    assert torch.equal(joined.tokens, docs.tokens) and torch.equal(joined.index, docs.index)
    divided = fstep.simulate(lambda m: fstep.divide_documents(docs, axis=m.dp, together=together).index, dp=ranks)
    assert sorted(torch.cat(divided).tolist()) == list(range(8))
    assert all(
        PAIR[i] not in [PAIR[j] for j in b.tolist()] for a in divided for b in divided if a is not b for i in a.tolist()
    )


def test_each_on_its_own_is_the_default() -> None:
    docs = make()
    for cut in ({"num": 3}, {"max_tokens": 12}):
        alone = fstep.split_microbatches(docs, together=torch.arange(8), **cut)
        assert [p.index.tolist() for p in alone] == [p.index.tolist() for p in fstep.split_microbatches(docs, **cut)]


def test_what_does_not_fit_together_is_named() -> None:
    docs = make()
    with pytest.raises(ValueError, match=r"documents \[1, 4\], which stay together, need 16 tokens .* or cut them"):
        fstep.split_microbatches(docs, max_tokens=12, together=docs.per_document["pair"])
    with pytest.raises(ValueError, match=r"divide_documents: together is torch.int64 \(3,\) for 8 documents; give each a"):
        fstep.divide_documents(docs, axis=Mesh().dp, together=torch.arange(3))
    with pytest.raises(ValueError, match=r"split_microbatches: together is torch\.float32"):
        fstep.split_microbatches(docs, num=1, together=torch.zeros(8))
    with pytest.raises(TypeError, match="split_microbatches: together is a list; pass a number for each document"):
        fstep.split_microbatches(docs, num=1, together=[0] * 8)
