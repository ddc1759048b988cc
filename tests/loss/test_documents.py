"""Numbers of documents at their tokens, on documents, rows and shards: the same token has the same number."""

from __future__ import annotations

import math

import pytest
import torch

import fstep
import fstep.testing

DOCS = fstep.make_docs(
    [[1, 2, 3, 4], [5], [6, 7, 8], [9, 9]],
    weights=[[0, 1, 3, 0], [1], [0, 0, 2], [0, 0]],
    targets={"x": [[1, 2, 3, 4], [5], [6, 7, 8], [9, 9]]},
)
NUMBERS = torch.tensor([10.0, 20.0, 30.0, 40.0])


def test_spread_by_hand() -> None:
    x = NUMBERS.clone().requires_grad_()
    found = fstep.testing.assert_pure(fstep.spread_documents, x, DOCS)
    assert found.tolist() == [10] * 4 + [20] + [30] * 3 + [40] * 2
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [4, 1, 3, 2]
    assert fstep.spread_documents(x, DOCS, last=True).tolist() == [0, 0, 10, 0, 0, 0, 0, 30, 0, 0]


def test_document_weights_by_hand() -> None:
    found = fstep.testing.assert_pure(fstep.document_weights, DOCS)
    assert found.tolist() == [0, 0.25, 0.75, 0, 0, 0, 0, 1, 0, 0]
    assert fstep.document_weights(fstep.make_docs([])).shape == (0,)


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_a_row_says_what_its_documents_say(multiple_of: int) -> None:
    packed = fstep.pack_thd(DOCS, multiple_of=multiple_of)
    real = packed.weights != 0
    before = DOCS.weights != 0
    for last in (False, True):
        row, docs = (fstep.spread_documents(NUMBERS, b, last=last) for b in (packed, DOCS))
        assert row[real].tolist() == docs[before].tolist()
    assert (fstep.spread_documents(NUMBERS, packed, last=True) != 0).sum() == 2
    assert fstep.document_weights(packed)[real].tolist() == fstep.document_weights(DOCS)[before].tolist()
    assert (fstep.document_weights(packed)[~real] == 0).all()


def test_shards() -> None:
    packed = fstep.pack_thd(DOCS, multiple_of=4)

    def f(mesh: fstep.Mesh) -> torch.Tensor:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        return fstep.cp_unshard(fstep.spread_documents(NUMBERS, part), part, axis=mesh.cp, grad="sum")

    assert torch.equal(fstep.simulate(f, cp=2)[1], fstep.spread_documents(NUMBERS, packed))


def test_a_row_without_documents() -> None:
    row = fstep.pack_thd(fstep.make_docs([]), length=3)
    assert fstep.spread_documents(torch.zeros(0), row).tolist() == [0, 0, 0]
    assert fstep.spread_documents(torch.zeros(0), row, last=True).tolist() == [0, 0, 0]
    assert fstep.document_weights(row).tolist() == [0, 0, 0]
    assert fstep.cp_sequence_log_ratio(torch.full((3,), math.nan), row).tolist() == [0, 0, 0]


def test_weigh() -> None:
    x = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    loss = fstep.weigh(x, torch.tensor([2.0, 0.0, 0.5]))
    assert (loss.num.item(), loss.den.item()) == (3.5, 2.5)
    assert torch.autograd.grad(loss.num, x)[0].tolist() == [2, 0, 0.5]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"spread_documents: values has shape \(3,\) for 4 documents; give one number a doc"
    ):
        fstep.spread_documents(NUMBERS[:3], DOCS)
    with pytest.raises(TypeError, match="document_weights: batch is a Tensor; pass what make_docs or pack_thd returns"):
        fstep.document_weights(NUMBERS)  # type: ignore[arg-type]

    def shard(mesh: fstep.Mesh) -> fstep.Packed:
        return fstep.cp_shard(fstep.pack_thd(DOCS, multiple_of=4), axis=mesh.cp)

    said = "batch is one of 2 shards, in which no document is whole"
    with pytest.raises(ValueError, match=f"document_weights: {said}"):
        fstep.simulate(lambda mesh: fstep.document_weights(shard(mesh)), cp=2)
    with pytest.raises(ValueError, match=f"spread_documents: {said}"):
        fstep.simulate(lambda mesh: fstep.spread_documents(NUMBERS, shard(mesh), last=True), cp=2)
