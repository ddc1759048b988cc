"""Documents of all ranks on each: dividing and gathering is doing nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Docs, Mesh


@fstep.pytree
class Pictures(Docs):
    """Documents with items of several numbers each."""

    items: Tensor = fstep.cut("document", counts="item")
    pixels: Tensor = fstep.cut("item")


def batch(documents: int) -> Pictures:
    lengths = [5, 1, 7, 2, 2, 9, 3][:documents]
    made = fstep.make_docs(
        [list(range(n)) for n in lengths],
        targets={"a": [[n + 0.5] * n for n in lengths]},
        per_document={"done": [n > 2 for n in lengths], "pair": torch.arange(2 * documents).view(documents, 2)},
        shared={"width": 3},
    )
    items = torch.tensor([2, 0, 1, 3, 0, 1, 1][:documents])
    return Pictures(**vars(made), items=items, pixels=torch.arange(2.0 * int(items.sum())).view(-1, 2))


@pytest.mark.parametrize("documents", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathering_inverts_dividing(size: int, documents: int) -> None:
    docs = batch(documents)

    def f(mesh: Mesh) -> tuple[Pictures, Pictures]:
        mine = fstep.divide_documents(docs, axis=mesh.dp)
        return mine, fstep.testing.assert_pure(lambda: fstep.gather_documents(mine, axis=mesh.dp))

    for _, everyone in fstep.simulate(f, dp=size):
        fstep.testing.assert_trees_close(everyone, docs, rtol=0)
        assert everyone.shared == {"width": 3}


def test_it_is_over_the_axis_that_is_given() -> None:
    docs = batch(7)

    def f(mesh: Mesh) -> Pictures:
        mine = fstep.divide_documents(docs, axis=mesh.over("dp", "tp"))
        some = fstep.gather_documents(mine, axis=mesh.tp)
        assert len(mine.lengths) < len(some.lengths) < 7
        return fstep.gather_documents(some, axis=mesh.dp)

    for everyone in fstep.simulate(f, dp=2, tp=2):
        fstep.testing.assert_trees_close(everyone, docs, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_documents_come_in_the_order_of_their_index_on_any_mesh(size: int) -> None:
    docs, drawn = batch(7), [5, 0, 3, 6]

    def f(mesh: Mesh) -> Pictures:
        mine = fstep.divide_documents(fstep.select_documents(docs, drawn), axis=mesh.dp)
        return fstep.gather_documents(mine, axis=mesh.dp)

    for everyone in fstep.simulate(f, dp=size):
        fstep.testing.assert_trees_close(everyone, fstep.select_documents(docs, sorted(drawn)), rtol=0)


@pytest.mark.parametrize(
    "other",
    [{"b": torch.ones(1)}, {}, {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1, 2)}, {"a": torch.tensor([1])}],
)
def test_fields_that_differ_between_ranks_are_refused_on_all(other: dict[str, Tensor]) -> None:
    def f(mesh: Mesh) -> None:
        per_document = other if mesh.dp.rank == 1 else {"a": torch.ones(1)}
        mine = fstep.make_docs([[1]], per_document=per_document)
        with pytest.raises(
            ValueError, match=r"rank 1 of the axis has other fields than rank 0, .*lengths torch.int64 \[n\]"
        ):
            fstep.gather_documents(mine, axis=mesh.dp)

    fstep.simulate(f, dp=3)


def test_errors() -> None:
    row = fstep.pack_thd(fstep.make_docs([[1, 2]]))
    with pytest.raises(TypeError, match=r"Packed\.tokens is cut along 'token', which no field counts; pass documents"):
        fstep.simulate(lambda mesh: fstep.gather_documents(row, axis=mesh.dp), dp=2)
    with pytest.raises(TypeError, match="gather_documents: axis"):
        fstep.gather_documents(batch(2), axis="dp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gather_documents: weights has 1 entries and the batch 6 tokens"):
        fstep.gather_documents(dataclasses.replace(batch(2), weights=torch.ones(1)), axis=fstep.Axis("dp"))


def test_what_is_no_batch_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="gather_documents: a batch is a dict; pass what make_docs returns"):
        fstep.gather_documents({"tokens": torch.zeros(2)}, axis=fstep.Axis("dp"))
    with pytest.raises(TypeError, match="join_documents: a batch is a list; pass"):
        fstep.join_documents([[1], [2]])
