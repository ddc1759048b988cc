"""Splitting: every document once, within the budget, evenly, and the loss and gradients of the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fstep
import fstep.testing
from tests.batch.cases import assert_same, draw, random_docs, random_media
from tests.batch.test_plan import zipf


def of_lengths(lengths: list[int]) -> fstep.Docs:
    return fstep.make_docs([[d + 1] * n for d, n in enumerate(lengths)])


@pytest.mark.parametrize("make", [random_docs, random_media])
@pytest.mark.parametrize(
    "arguments", [{"num": 1}, {"num": 3}, {"num": 50}, {"max_tokens": 9}, {"max_tokens": 16, "multiple_of": 4}]
)
@pytest.mark.parametrize("seed", range(5))
def test_join_inverts_split(seed: int, arguments: dict[str, int], make: Any) -> None:
    batch = make(seed)
    if "multiple_of" in arguments:
        batch = fstep.select_documents(batch, (batch.lengths <= 16).nonzero()[:, 0])
        batch = dataclasses.replace(batch, index=torch.arange(len(batch.lengths)))
    parts = fstep.testing.assert_pure(fstep.split_microbatches, batch, **arguments)
    assert_same(fstep.join_documents(parts), batch)
    for part in parts:
        assert type(part) is type(batch)
        assert part.index.tolist() == sorted(part.index.tolist())  # documents of a part keep their order


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("seed", range(10))
def test_no_part_exceeds_the_budget_when_packed(seed: int, multiple_of: int) -> None:
    batch = of_lengths(draw(seed, 1, 40, 60))
    parts = fstep.split_microbatches(batch, max_tokens=96, multiple_of=multiple_of)
    for part in parts:
        packed = fstep.pack_thd(part, multiple_of=multiple_of, length=96)  # raises if it does not fit
        assert packed.index.tolist() == part.index.tolist()
    rows = fstep.plan_first_fit([-(-n // multiple_of) * multiple_of for n in batch.lengths.tolist()], 96)
    assert len(parts) == len(rows)


def test_padding_counts_towards_the_budget() -> None:
    # Without padding 5 + 3 tokens fit into 8; with each padded to a multiple of 4 they need 12.
    batch = of_lengths([5, 3])
    assert len(fstep.split_microbatches(batch, max_tokens=8)) == 1
    assert len(fstep.split_microbatches(batch, max_tokens=8, multiple_of=4)) == 2


def test_parts_are_evened_out() -> None:
    # First fit alone would give 8 and 1.
    parts = fstep.split_microbatches(of_lengths([4, 4, 1]), max_tokens=8)
    assert sorted(int(p.lengths.sum()) for p in parts) == [4, 5]
    for seed in range(5):
        batch = of_lengths(zipf(seed, 300, 400))
        for arguments in ({"num": 6}, {"max_tokens": 2048}):
            tokens = [int(p.lengths.sum()) for p in fstep.split_microbatches(batch, **arguments)]
            assert max(tokens) - min(tokens) <= 0.01 * max(tokens), tokens


def test_evening_out_gives_way_where_it_does_not_fit() -> None:
    # 6+4 and 5+3+2 fill two bins exactly; longest first into the lightest, 6+3+2 | 5+4, would not fit.
    parts = fstep.split_microbatches(of_lengths([6, 5, 4, 3, 2]), max_tokens=10)
    assert [p.lengths.tolist() for p in parts] == [[6, 4], [5, 3, 2]]


def test_more_parts_than_documents_are_empty_and_weigh_nothing() -> None:
    parts = fstep.split_microbatches(random_docs(0, [3, 2]), num=4)
    assert sorted(len(p.lengths) for p in parts) == [0, 0, 1, 1]
    for part in parts:
        packed = fstep.pack_thd(part, multiple_of=4)
        if not len(part.lengths):
            assert len(packed.tokens) == 4 and float(packed.weights.sum()) == 0 and (packed.labels == -100).all()


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_ranks_divide_a_batch_among_them(ranks: int) -> None:
    batch = random_docs(4, [9, 1, 4, 4, 6, 2])
    parts = fstep.simulate(lambda mesh: fstep.testing.assert_pure(fstep.divide_documents, batch, axis=mesh.dp), dp=ranks)
    assert_same(fstep.join_documents(parts), batch)
    tokens = [int(part.lengths.sum()) for part in parts]
    assert len(tokens) == ranks and max(tokens) == {1: 26, 2: 13, 4: 9, 9: 9}[ranks]  # the best there is
    assert sum(n == 0 for n in tokens) == max(ranks - 6, 0)


def test_no_documents() -> None:
    none = fstep.make_docs([])
    assert [len(fstep.split_microbatches(none, **a)) for a in ({"num": 3}, {"max_tokens": 8})] == [3, 1]


@pytest.mark.parametrize("arguments", [{"num": 1}, {"num": 2}, {"num": 5}, {"num": 9}, {"max_tokens": 12, "multiple_of": 4}])
def test_gradients_do_not_depend_on_the_split(arguments: dict[str, int]) -> None:
    batch = random_docs(3, [7, 1, 4, 12, 3, 3])
    params = {"table": torch.randn(1000, 6, dtype=torch.float64), "head": torch.randn(1000, 6, dtype=torch.float64)}

    def stage(p: Any, x: Any, mb: fstep.Packed) -> torch.Tensor:
        h = fstep.embed(mb.tokens, p["table"])[:, None]
        return fstep.packed_attention(h, h, h, mb.cu_seqlens_padded, max_seqlen=mb.max_seqlen)[:, 0]

    def loss(p: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(fstep.token_logprobs(x, p["head"], mb.labels), mb.weights)

    def run(parts: Any, multiple_of: int) -> Any:
        return fstep.pp_forward_backward(stage, loss, params, [fstep.pack_thd(p, multiple_of=multiple_of) for p in parts])

    whole = run([batch], 1)
    split = run(fstep.split_microbatches(batch, **arguments), arguments.get("multiple_of", 1))
    fstep.testing.assert_trees_close(split, whole, rtol=1e-12)
    assert float(whole[0].den) == pytest.approx(float(batch.weights.sum()), rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num=None and max_tokens=None; pass exactly one"),
        ({"num": 2, "max_tokens": 3}, "num=2 and max_tokens=3; pass exactly one"),
        ({"num": 0}, "num is 0; pass 1 or more"),
        ({"num": 2, "multiple_of": 0}, "multiple_of is 0"),
        (
            {"max_tokens": 6},
            r"document 11 needs 7 tokens \(with multiple_of=1\) and max_tokens is 6; raise max_tokens or cut",
        ),
        ({"max_tokens": 7, "multiple_of": 4}, r"document 11 needs 8 tokens \(with multiple_of=4\) and max_tokens is 7"),
    ],
)
def test_split_refuses(arguments: dict[str, int], message: str) -> None:
    batch = dataclasses.replace(of_lengths([3, 7, 2]), index=torch.tensor([10, 11, 12]))
    with pytest.raises(ValueError, match=f"^split_microbatches: {message}"):
        fstep.split_microbatches(batch, **arguments)


@pytest.mark.parametrize("dp", [2, 3])
@pytest.mark.parametrize("arguments", [{"num": 3}, {"max_tokens": 13}, {"max_tokens": 16, "multiple_of": 4}])
@pytest.mark.parametrize("lengths", [[13, 1, 1, 1, 9, 2, 2, 3, 3], [7, 6], [5], []], ids=str)
def test_ranks_cut_their_own_documents_in_the_same_number_of_parts(
    lengths: list[int], arguments: dict[str, int], dp: int
) -> None:
    batch = random_docs(1, lengths)
    results = fstep.simulate(lambda mesh: fstep.split_microbatches(batch, axis=mesh.dp, **arguments), dp=dp)
    assert len({len(parts) for parts in results}) == 1
    for rank, parts in enumerate(results):
        mine = fstep.simulate(lambda mesh: fstep.divide_documents(batch, axis=mesh.dp), dp=dp)[rank]
        assert sorted(i for part in parts for i in part.index.tolist()) == sorted(mine.index.tolist())
        assert all(int(part.lengths.sum()) <= 16 for part in parts if "max_tokens" in arguments)
    assert sorted(i for parts in results for part in parts for i in part.index.tolist()) == list(range(len(lengths)))
