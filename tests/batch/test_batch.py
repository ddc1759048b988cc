"""Documents: how they are made and checked, and how every field of a batch, one's own included, is cut and joined."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

import fstep
import fstep.testing
from fstep.batch.batch import check_sizes, ragged_index
from tests.batch.cases import Media, assert_same, draw, per_document, random_docs, random_media

THREE = [[1, 2, 3], [4], [5, 6]]


# make_docs -----------------------------------------------------------------------------------------------------------


def test_make_docs_lays_everything_end_to_end() -> None:
    docs = fstep.make_docs(
        THREE,
        weights=[[9, 0, 1], [9], [9, 0.5]],
        targets={"a": [[1, 2, 3], [4], [5, 6]]},
        inputs={"k": [[True, False, True], [True], [False, False]]},
        per_document={"r": [0.1, 0.2, 0.3]},
        shared={"name": "x"},
    )
    assert docs.tokens.tolist() == [1, 2, 3, 4, 5, 6] and docs.tokens.dtype == torch.int64
    assert docs.lengths.tolist() == [3, 1, 2] and docs.lengths.dtype == torch.int64
    assert docs.index.tolist() == [0, 1, 2]
    # Nothing comes before a document's first token, so that predicting it counts for nothing whatever was given.
    assert docs.weights.tolist() == [0, 0, 1, 0, 0, 0.5] and docs.weights.dtype == torch.float32
    assert docs.targets["a"].tolist() == [1, 2, 3, 4, 5, 6]
    assert docs.inputs["k"].tolist() == [True, False, True, True, False, False]
    assert docs.per_document["r"].tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()
    assert docs.shared == {"name": "x"}


def test_weights_default_to_one_but_for_first_tokens() -> None:
    assert fstep.make_docs(THREE).weights.tolist() == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tokens_of_any_integer_dtype(dtype: torch.dtype) -> None:
    docs = fstep.make_docs([torch.tensor(t, dtype=dtype) for t in THREE])
    assert_same(docs, fstep.make_docs(THREE))


def test_lists_and_tensors_may_be_mixed_and_nothing_is_rounded() -> None:
    weights: list[Any] = [torch.tensor([0, 1, 1]), torch.tensor([1.0]), [0.25, 0.5]]
    docs = fstep.make_docs([torch.tensor([1, 2, 3]), [4], (5, 6)], weights=weights)
    assert docs.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert docs.weights.tolist() == [0, 1, 1, 0, 0, 0.5]
    wide = fstep.make_docs([[1, 2]], weights=[torch.tensor([0, 1 / 3], dtype=torch.float64)])
    assert wide.weights.tolist() == [0, 1 / 3]


def test_gradients_reach_what_documents_are_made_of() -> None:
    advantage = [torch.ones(3, requires_grad=True), torch.ones(1), torch.ones(2, requires_grad=True)]
    docs = fstep.make_docs(THREE, targets={"a": advantage})
    (g,) = torch.autograd.grad((docs.targets["a"] * torch.arange(6.0)).sum(), advantage[2])
    assert g.tolist() == [4, 5]


def test_no_documents() -> None:
    docs = fstep.make_docs([], weights=[], targets={"a": []}, per_document={"r": []}, vocab_size=5)
    assert [len(x) for x in (docs.tokens, docs.weights, docs.lengths, docs.index, docs.targets["a"])] == [0] * 5
    assert docs.tokens.dtype == docs.lengths.dtype == torch.int64 and docs.weights.dtype == torch.float32


def test_make_docs_changes_nothing_it_was_given() -> None:
    tokens, weights = [torch.tensor(t) for t in THREE], [torch.ones(len(t)) for t in THREE]
    docs = fstep.testing.assert_pure(
        fstep.make_docs, tokens, weights=weights, targets={"a": weights}, shared={"x": weights[0]}
    )
    assert docs.weights[0] == 0 and weights[0][0] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(tokens=[[1], []]), ValueError, "document 1 is empty; leave it out"),
        (dict(tokens=[1, 2, 3]), TypeError, r"document 0 is 1; pass a sequence of token ids for each, e.g. \[\[5"),
        (dict(tokens=torch.tensor([1, 2])), TypeError, r"document 0 is tensor\(1\); pass a sequence"),
        (dict(tokens=["ab"]), TypeError, "document 0 is 'ab'; pass a sequence of token ids"),
        (dict(tokens=[[1.0, 2.0]]), TypeError, "tokens are torch.float32; pass integer token ids"),
        (dict(tokens=[torch.tensor([1, 2]), torch.tensor([1.5])]), TypeError, "tokens are torch.float32"),
        (dict(tokens=[[True, False]]), TypeError, "tokens are torch.bool; pass integer token ids"),
        (dict(tokens=[torch.ones(2, 1, dtype=torch.int64)]), ValueError, r"tokens of a token have shape \(1,\)"),
        (dict(tokens=[[1, 2], [3, -1]]), ValueError, "document 1, token 1 is -1, negative; check the tokenizer"),
        (dict(tokens=[[1, 7], [3, 9, 8]], vocab_size=8), ValueError, "document 1, token 1 is 9, past the vocabulary of 8"),
        (dict(tokens=[[0]], vocab_size=0), ValueError, "document 0, token 0 is 0, past the vocabulary of 0"),
        (dict(weights=[[1, 1, 1], [1]]), ValueError, "weights has 2 documents, tokens has 3; give one for each"),
        (
            dict(weights=[[1, 1, 1], [1], [1]]),
            ValueError,
            "weights of document 2 has 1 values for 2 tokens; give one a token",
        ),
        (
            dict(weights=[[1, float("nan"), 1], [1], [1, 1]]),
            ValueError,
            "weight of document 0, token 1 is nan; give a finite",
        ),
        (dict(weights=[[1, 1, 1], [1], [1, float("inf")]]), ValueError, "weight of document 2, token 1 is inf"),
        (
            dict(weights=[torch.ones(3, 2), torch.ones(1, 2), torch.ones(2, 2)]),
            ValueError,
            r"weights of a token have shape \(2,\)",
        ),
        (
            dict(targets={"adv": [[1.0, 1.0, 1.0], [1.0], [1.0] * 3]}),
            ValueError,
            r"targets\['adv'\] of document 2 has 3 values for 2",
        ),
        (dict(inputs={"ids": [[1]]}), ValueError, r"inputs\['ids'\] has 1 documents, tokens has 3"),
        (
            dict(per_document={"r": [1.0]}),
            ValueError,
            r"per_document\['r'\] has shape \(1,\) for 3 documents; give one a document",
        ),
        (dict(per_document={"r": 1.0}), ValueError, r"per_document\['r'\] has shape \(\) for 3 documents"),
    ],
)
def test_make_docs_names_the_mistake(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^make_docs: .*{message}"):
        fstep.make_docs(**{"tokens": THREE, **arguments})


def test_the_last_id_of_the_vocabulary_is_in_it() -> None:
    assert fstep.make_docs([[0, 7]], vocab_size=8).tokens.tolist() == [0, 7]


def test_weights_that_are_not_finite_are_refused_at_a_first_token_too() -> None:
    with pytest.raises(ValueError, match="weight of document 1, token 0 is nan"):
        fstep.make_docs([[1], [2, 3]], weights=[[0.0], [float("nan"), 1.0]])


# select_documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_select_takes_everything_that_belongs_to_a_document(seed: int) -> None:
    batch = random_docs(seed)
    rows = draw(seed, 0, len(batch.lengths) - 1, 5)  # in any order, some twice
    taken = fstep.testing.assert_pure(fstep.select_documents, batch, rows)
    whole = per_document(batch)
    assert per_document(taken) == [whole[r] for r in rows]
    assert taken.shared is batch.shared
    for a, b in zip(fstep.tree_leaves(taken), fstep.tree_leaves(batch), strict=True):
        assert getattr(a, "dtype", a) == getattr(b, "dtype", b)


@pytest.mark.parametrize("seed", range(6))
def test_select_takes_items_and_patches_along(seed: int) -> None:
    batch = random_media(seed)
    rows = draw(seed + 1, 0, len(batch.lengths) - 1, 4)
    taken = fstep.select_documents(batch, rows)
    # Slow and plain: which items lie in which document, which patches in which item.
    items, patches, first = [], [], 0
    for n in batch.items.tolist():
        items.append(list(range(first, first + n)))
        first += n
    first = 0
    for n in batch.sizes.tolist():
        patches.append(list(range(first, first + n)))
        first += n
    wanted = [i for r in rows for i in items[r]]
    assert torch.equal(taken.items, batch.items[rows])
    assert torch.equal(taken.sizes, batch.sizes[wanted])
    assert torch.equal(taken.captions["ids"], batch.captions["ids"][wanted])
    assert torch.equal(taken.patches, batch.patches[[p for i in wanted for p in patches[i]]])
    assert (type(taken), taken.width) == (Media, 4)


@pytest.mark.parametrize(
    "rows", [[2, 0], (2, 0), torch.tensor([2, 0]), torch.tensor([2, 0], dtype=torch.int32), range(2, -1, -2)]
)
def test_rows_may_be_any_numbers(rows: Any) -> None:
    assert fstep.select_documents(fstep.make_docs(THREE), rows).tokens.tolist() == [5, 6, 1, 2, 3]


def test_select_leaves_nothing_for_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        docs = fstep.make_docs(THREE)
        ref = weakref.ref(docs.tokens)
        fstep.select_documents(docs, [2, 0])
        del docs
        assert ref() is None
    finally:
        gc.enable()


def test_no_rows_is_an_empty_batch_of_the_same_kind() -> None:
    batch = random_media(0)
    for rows in ([], torch.tensor([], dtype=torch.int64), range(0)):
        none = fstep.select_documents(batch, rows)
        assert [len(x) for x in (none.tokens, none.lengths, none.items, none.sizes, none.patches)] == [0] * 5
        assert none.patches.shape == (0, 5) and none.weights.dtype == batch.weights.dtype


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            torch.tensor([True, False, True]),
            TypeError,
            r"rows are torch.bool; pass the documents' numbers, e.g. mask.nonzero",
        ),
        ([True, False, True], TypeError, "rows are torch.bool"),
        ([0.5], TypeError, "rows are torch.float32"),
        ([0, 3], IndexError, "rows are 0 to 3 and there are 3 documents"),
        ([-4], IndexError, "rows are -4 to -4 and there are 3 documents"),
    ],
)
def test_select_refuses_rows_that_are_no_documents(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^select_documents: {message}"):
        fstep.select_documents(fstep.make_docs(THREE), rows)


def test_negative_rows_count_from_the_end() -> None:
    assert fstep.select_documents(fstep.make_docs(THREE), [-1, -3]).tokens.tolist() == [5, 6, 1, 2, 3]


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    "field", ["tokens", "weights", "index", "items", "sizes", "patches", "targets.advantage", "captions.ids"]
)
def test_a_field_of_the_wrong_length_is_named(field: str, change: int) -> None:
    batch = random_media(1)
    name, _, key = field.partition(".")

    def resize(x: torch.Tensor) -> torch.Tensor:
        return x[:-1] if change < 0 else torch.cat([x, torch.ones_like(x[:1])])

    value = getattr(batch, name)
    wrong = dataclasses.replace(batch, **{name: {**value, key: resize(value[key])} if key else resize(value)})
    # What a count field counts is longer or shorter than it says, or the count field is: either is named.
    other = {"items": "sizes", "sizes": "patches|captions.ids", "index": "index|items|per_document.reward"}.get(name, field)
    with pytest.raises(
        ValueError, match=rf"^select_documents: ({field}|{other}) has \d+ entries and the batch \d+ \w+s; give one"
    ):
        fstep.select_documents(wrong, [0])


def test_fields_have_to_say_how_they_are_cut() -> None:
    @fstep.pytree
    class Silent(fstep.Docs):
        more: torch.Tensor

    batch = Silent(**vars(fstep.make_docs(THREE)), more=torch.ones(3))
    calls = {
        "select_documents": lambda: fstep.select_documents(batch, [0]),
        "join_documents": lambda: fstep.join_documents([batch]),
        "gather_documents": lambda: fstep.gather_documents(batch, axis=fstep.Axis("dp")),
    }
    for name, call in calls.items():
        message = rf'^{name}: Silent.more does not say how it is cut; declare it as `more: .*cut\("token"\)`'
        with pytest.raises(TypeError, match=message):
            call()


def test_an_axis_has_to_be_counted_once() -> None:
    @fstep.pytree
    class Uncounted(fstep.Docs):
        patches: torch.Tensor = fstep.cut("patch")

    @fstep.pytree
    class Twice(fstep.Docs):
        items: torch.Tensor = fstep.cut("document", counts="item")
        films: torch.Tensor = fstep.cut("document", counts="item")

    docs = vars(fstep.make_docs(THREE))
    with pytest.raises(
        TypeError, match=r"Uncounted has fields cut along 'patch' and none that counts it; .*counts=\"patch\""
    ):
        fstep.select_documents(Uncounted(**docs, patches=torch.ones(2)), [0])
    with pytest.raises(TypeError, match="two fields of Twice count the same axis"):
        fstep.select_documents(Twice(**docs, items=torch.ones(3), films=torch.ones(3)), [0])


def test_a_batch_need_not_have_tokens() -> None:
    @fstep.pytree
    class Rewards:
        reward: torch.Tensor = fstep.cut("document")
        scale: float = fstep.cut("none", default=2.0)

    batch = Rewards(torch.tensor([1.0, 2.0, 3.0]))
    assert fstep.select_documents(batch, [2, 0]).reward.tolist() == [3, 1]
    assert fstep.join_documents([batch, batch]).reward.tolist() == [1, 2, 3, 1, 2, 3]
    with pytest.raises(IndexError, match="there are 3 documents"):
        fstep.select_documents(batch, [3])


@pytest.mark.parametrize("wrong", ["tokens", "Token"])
def test_cut_knows_its_axes(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"cut: '{wrong}' is no axis; pass one of token, document, item, patch, none"):
        fstep.cut(wrong)
    with pytest.raises(ValueError, match=f"cut: '{wrong}' is no axis"):
        fstep.cut("document", counts=wrong)


def test_check_sizes_returns_how_long_each_axis_is() -> None:
    batch = random_media(3)
    assert check_sizes("f", batch) == {
        "document": len(batch.lengths),
        "token": len(batch.tokens),
        "item": len(batch.sizes),
        "patch": len(batch.patches),
    }


def test_ragged_index() -> None:
    # rows of 2, 0, 3 elements: 0 1 | | 2 3 4
    counts = torch.tensor([2, 0, 3])
    assert ragged_index(counts, torch.tensor([2, 1, 0, 2])).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert ragged_index(counts, torch.tensor([], dtype=torch.int64)).tolist() == []


# join_documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_docs, random_media])
@pytest.mark.parametrize("seed", range(6))
def test_join_inverts_any_cut(make: Any, seed: int) -> None:
    batch = make(seed)
    order = torch.randperm(len(batch.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    for parts in ([order[:1], order[1:]], [order, []], [[], order], [[d] for d in order]):
        cut = [fstep.select_documents(batch, part) for part in parts]
        assert_same(fstep.testing.assert_pure(fstep.join_documents, cut), batch)


def test_join_goes_by_the_index() -> None:
    # A batch drawn in another order comes back in the order of its index; that of equal numbers is kept.
    drawn = fstep.select_documents(fstep.make_docs(THREE), [2, 0, 2])
    joined = fstep.join_documents(fstep.split_microbatches(drawn, num=1))
    assert joined.index.tolist() == [0, 2, 2] and joined.tokens.tolist() == [1, 2, 3, 5, 6, 5, 6]
    # Numbered afresh, it comes back as it was.
    fresh = dataclasses.replace(drawn, index=torch.arange(3))
    assert_same(fstep.join_documents(fstep.split_microbatches(fresh, num=3)), fresh)


def test_parts_of_parts_join() -> None:
    batch = random_media(2)
    half = len(batch.lengths) // 2
    parts = [fstep.select_documents(batch, range(half, len(batch.lengths))), fstep.select_documents(batch, range(half))]
    smaller = [p for part in parts for p in fstep.split_microbatches(part, num=2)]
    assert_same(fstep.join_documents(smaller), batch)


def test_join_of_nothing() -> None:
    with pytest.raises(ValueError, match="join_documents: there are no batches; pass at least one"):
        fstep.join_documents([])


def test_join_of_batches_with_other_names() -> None:
    a, b = fstep.make_docs([[1]], targets={"adv": [[1.0]]}), fstep.make_docs([[1]])
    with pytest.raises(
        ValueError, match=r"join_documents: targets of batch 1 holds \[\], and of batch 0 \['adv'\]; give all"
    ):
        fstep.join_documents([a, b])
