"""Answers beside those drawn one by one in a plain loop, from a model that sees all of a document so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Docs, Key, Mesh, Packed
from fstep.rollout import generate as room

F64 = torch.float64
KEY = Key.seed(5)
VOCAB = 7
PROMPTS = [[1, 2, 3], [4], [5, 5, 0, 6, 1, 2, 2], [0, 3]]
PARAMS = {"table": Key.seed(8).normal((13, VOCAB), dtype=F64), "unused": None}


def after(history: Tensor) -> Tensor:
    """Which row of the table says what follows: every token at its place matters."""
    place = torch.arange(len(history)) + 1
    return (history * place * place).sum() % 13


def decode(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
    """Remember every token; refuse positions that are not the next ones, and write into the cache it is given."""
    assert not torch.is_grad_enabled()
    if cache is None:
        docs = fstep.split_documents(mb.tokens, mb)
        assert all(torch.equal(p, torch.arange(len(p))) for p in fstep.split_documents(mb.positions, mb))
        seen = torch.full((len(docs), 100), -1)
        for row, doc in zip(seen, docs, strict=True):
            row[: len(doc)] = doc
        cache = {"seen": seen, "inner": (torch.tensor([len(d) for d in docs]),)}
    else:
        (lengths,) = cache["inner"]
        assert torch.equal(mb.positions, lengths) and mb.cu_seqlens.tolist() == list(range(len(lengths) + 1))
        cache["seen"][torch.arange(len(lengths)), lengths] = mb.tokens
        lengths += 1
    rows = [after(row[:n]) for row, n in zip(cache["seen"], cache["inner"][0].tolist(), strict=True)]
    return params["table"][torch.stack(rows)], cache


def one_by_one(index: int, prompt: list[int], sample: int, most: int, stop: list[int], **options: Any) -> tuple[Any, ...]:
    """One answer to one prompt, by the definition of its draws."""
    history, logprobs = list(prompt), [0.0] * len(prompt)
    for n in range(most):
        number = KEY.fold_in(index).fold_in(sample).fold_in(n // 16).uniform((16,), dtype=F64)[n % 16]
        logits = PARAMS["table"][after(torch.tensor(history))][None]
        token, logprob = fstep.sample_tokens(logits, number[None], **options)
        history.append(int(token))
        logprobs.append(float(logprob))
        if history[-1] in stop:
            return history, logprobs, True
    return history, logprobs, False


def check(docs: Docs, prompts: list[list[int]], samples: int, **options: Any) -> None:
    want = [(i, s, *one_by_one(i, p, s, **options)) for i, p in enumerate(prompts) for s in range(samples)]
    assert docs.lengths.tolist() == [len(history) for _, _, history, *_ in want]
    assert docs.tokens.tolist() == [t for _, _, history, *_ in want for t in history]
    flat = [x for *_, logprobs, _ in want for x in logprobs]
    torch.testing.assert_close(docs.targets["generator"], torch.tensor(flat, dtype=F64), rtol=0, atol=1e-14)
    weights = [float(t >= len(prompts[i])) for i, _, history, *_ in want for t in range(len(history))]
    assert docs.weights.tolist() == weights and docs.weights.dtype == torch.float32
    assert docs.index.tolist() == list(range(len(want)))
    assert docs.per_document["prompt"].tolist() == [i for i, *_ in want]
    assert docs.per_document["finished"].tolist() == [done for *_, done in want]
    assert docs.inputs == {} and docs.targets.keys() == {"generator"}


CASES: list[dict[str, Any]] = [
    {"most": 1, "stop": [], "samples": 1},
    {"most": 5, "stop": [], "samples": 2},
    {"most": 40, "stop": [6], "samples": 1, "temperature": 0.6},
    {"most": 40, "stop": [0, 6], "samples": 3, "top_p": 0.8},
    {"most": 17, "stop": [3], "samples": 4, "top_k": 4, "temperature": 1.4},
    {"most": 33, "stop": [2], "samples": 2, "temperature": 0},
]


@pytest.mark.parametrize("every", [1, 3, 16])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_drawn_one_by_one(case: dict[str, Any], every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_every", lambda device: every)
    docs = fstep.generate(decode, PARAMS, fstep.make_docs(PROMPTS), KEY, **case)
    check(docs, PROMPTS, **case)


def test_finished_rows_are_dropped_and_no_token_is_computed_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def counted(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
        rows.append(len(mb.cu_seqlens) - 1)
        return decode(params, cache, mb)

    docs = fstep.generate(counted, PARAMS, fstep.make_docs(PROMPTS), KEY, most=40, stop=[0, 6], samples=3)
    answers = docs.lengths - torch.tensor([len(p) for p in PROMPTS for _ in range(3)])
    assert docs.per_document["finished"].all()
    assert len(rows) == int(answers.max())  # the last answer's last token is not decoded
    assert rows[0] == 4 and rows[1] > rows[-1] >= 1  # prompts are computed once for all samples
    for n, count in enumerate(rows[1:], 1):
        going = int((answers > n).sum())
        assert going <= count < 2 * going
    rows.clear()
    fstep.generate(counted, PARAMS, fstep.make_docs(PROMPTS), KEY, most=1)
    assert rows == [4]


def test_an_answer_does_not_depend_on_who_is_beside_it() -> None:
    prompts, options = fstep.make_docs(PROMPTS), {"most": 20, "stop": [6], "samples": 3}
    whole = fstep.generate(decode, PARAMS, prompts, KEY, **options)
    for rows in ([2], [3, 0], [1, 2, 3, 0]):
        part = fstep.generate(decode, PARAMS, fstep.select_documents(prompts, rows), KEY, **options)
        numbers = [3 * r + s for r in rows for s in range(3)]
        fstep.testing.assert_trees_close(part, fstep.select_documents(whole, numbers), rtol=0)
    fewer = fstep.generate(decode, PARAMS, prompts, KEY, **{**options, "samples": 1})
    for i, tokens in enumerate(fewer.tokens.split(fewer.lengths.tolist())):
        assert torch.equal(tokens, fstep.select_documents(whole, [3 * i]).tokens)


def test_ranks_that_divide_the_prompts_give_what_one_gives() -> None:
    prompts, options = fstep.make_docs(PROMPTS), {"most": 12, "stop": [6], "samples": 2}

    def f(mesh: Mesh) -> Docs:
        mine = fstep.divide_documents(prompts, axis=mesh.dp)
        return fstep.gather_documents(fstep.generate(decode, PARAMS, mine, KEY, **options), axis=mesh.dp)

    whole = fstep.generate(decode, PARAMS, prompts, KEY, **options)
    for docs in (*fstep.simulate(f, dp=2), *fstep.simulate(f, dp=5)):  # of five, one has no prompt
        fstep.testing.assert_trees_close(docs, whole, rtol=0)


def test_a_rank_without_prompts_gets_documents_of_the_same_fields() -> None:
    none = fstep.generate(decode, PARAMS, fstep.make_docs([]), KEY, most=3)
    some = fstep.generate(decode, PARAMS, fstep.make_docs([[1]]), KEY, most=3)
    assert [x.dtype for x in fstep.tree_leaves(none)] == [x.dtype for x in fstep.tree_leaves(some)]
    assert fstep.tree_paths(none) == fstep.tree_paths(some) and len(none.tokens) == len(none.lengths) == 0


@pytest.mark.parametrize(("params", "out"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_rank_without_prompts_has_the_dtype_that_the_others_get(params: torch.dtype, out: torch.dtype) -> None:
    def other(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
        assert mb.per_document.keys() <= {"truth"}
        return torch.zeros(len(mb.cu_seqlens) - 1, VOCAB, dtype=out), {}

    def f(mesh: Mesh) -> Docs:
        mine = fstep.divide_documents(fstep.make_docs([[1, 2]], per_document={"truth": [7]}), axis=mesh.dp)
        docs = fstep.generate(other, {"w": torch.zeros(1, dtype=params)}, mine, KEY, most=3)
        return fstep.gather_documents(docs, axis=mesh.dp)

    for docs in fstep.simulate(f, dp=2):
        assert docs.targets["generator"].dtype == out and docs.lengths.tolist() == [5]


def test_ids_of_32_bits() -> None:
    docs = fstep.make_docs(PROMPTS)
    narrow = dataclasses.replace(docs, tokens=docs.tokens.int())
    got = fstep.generate(decode, PARAMS, narrow, KEY, most=5, samples=2)
    assert got.tokens.dtype == torch.int32
    want = fstep.generate(decode, PARAMS, docs, KEY, most=5, samples=2)
    fstep.testing.assert_trees_close(dataclasses.replace(got, tokens=got.tokens.long()), want, rtol=0)


def test_what_came_with_a_prompt_is_beside_each_answer() -> None:
    prompts = fstep.make_docs([[1, 2], [3]], per_document={"truth": [7, 8]}, shared={"width": 3})
    numbered = dataclasses.replace(prompts, index=torch.tensor([40, 9]), weights=prompts.weights.double())
    seen: list[tuple[Any, Any]] = []

    def shows(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
        seen.append((mb.shared, mb.index.tolist()))
        return decode(params, cache, mb)

    docs = fstep.generate(shows, PARAMS, numbered, KEY, most=2, samples=2)
    assert seen == [({"width": 3}, [40, 9]), ({"width": 3}, [80, 81, 18, 19])]
    assert docs.per_document["truth"].tolist() == [7, 7, 8, 8]
    assert docs.per_document["prompt"].tolist() == [40, 40, 9, 9] and docs.index.tolist() == [80, 81, 18, 19]
    assert docs.shared == {"width": 3} and docs.weights.dtype == F64


def test_keys_differ_by_token_sample_prompt_and_seed() -> None:
    def even(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
        return torch.zeros(len(mb.cu_seqlens) - 1, 1000), {}

    docs = fstep.generate(even, {}, fstep.make_docs([[1], [1]]), Key.seed(0), most=50, samples=2)
    answers = docs.tokens.view(4, 51)[:, 1:]
    assert len(answers.unique()) > 150  # of 200 drawn from 1000, 181 are to be expected
    again = fstep.generate(even, {}, fstep.make_docs([[1], [1]]), Key.seed(1), most=50, samples=2)
    assert int((again.tokens == docs.tokens).sum()) < 4 + 10


def test_nothing_changes() -> None:
    prompts = fstep.make_docs(PROMPTS, per_document={"truth": [1, 2, 3, 4]})
    docs = fstep.testing.assert_pure(fstep.generate, decode, PARAMS, prompts, KEY, most=9, stop=[6], samples=2)
    assert not any(x.requires_grad for x in fstep.tree_leaves(docs))


@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_logits_that_make_no_distribution_are_named(bad: float, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_every", lambda device: every)

    def breaks(params: Any, cache: Any, mb: Packed) -> tuple[Tensor, Any]:
        logits, cache = decode(params, cache, mb)
        broken = (mb.positions[mb.cu_seqlens_padded[1:] - 1] == 8)[:, None]  # the prompt of 7 tokens comes there first
        return logits.masked_fill(broken, bad), cache

    with pytest.raises(ValueError, match=r"generate: logits for prompt 12 make no distribution .* within \d+ tokens; look"):
        numbered = dataclasses.replace(fstep.make_docs(PROMPTS), index=torch.tensor([10, 11, 12, 13]))
        fstep.generate(breaks, PARAMS, numbered, KEY, most=3)
    ended = fstep.generate(breaks, PARAMS, fstep.make_docs([[1]]), KEY, most=30, stop=range(VOCAB))
    assert ended.lengths.tolist() == [2]  # what is computed past the end is nobody's


def test_stop_tokens_of_other_libraries_are_numbers_too() -> None:
    docs = [
        fstep.generate(decode, PARAMS, fstep.make_docs(PROMPTS), KEY, most=40, stop=stop) for stop in ([6], [numpy.int64(6)])
    ]
    fstep.testing.assert_trees_close(*docs, rtol=0)
    assert docs[0].per_document["finished"].any()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("logits", "cache", "message"),
    [
        ((5, VOCAB), {}, r"decode returned logits \(5, 7\) for 2 documents; return \[documents, vocab\]"),
        ((VOCAB,), {}, r"decode returned logits \(7,\) for 2"),
        ((2, VOCAB), {"a": {"keys": torch.zeros(3, 2, 8)}}, r"cache with a.keys of shape \(3, 2, 8\) for 2 documents; give"),
        ((2, VOCAB), torch.tensor(1), r"cache with a leaf of shape \(\) for 2"),
    ],
)
def test_what_has_no_row_for_each_document_is_refused(logits: Any, cache: Any, message: str, samples: int) -> None:
    with pytest.raises(ValueError, match=message):
        fstep.generate(
            lambda *_: (torch.zeros(logits), cache), {}, fstep.make_docs([[1, 2], [3, 4, 5]]), KEY, most=2, samples=samples
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"decode": 3}, TypeError, "generate: decode is a int; pass a function"),
        ({"prompts": [[1]]}, TypeError, "generate: prompts is a list; pass what make_docs returns"),
        ({"key": 0}, TypeError, "generate: key is a int; pass a key"),
        ({"most": 0}, ValueError, "generate: most is 0; pass 1 or more"),
        ({"most": 1.5}, TypeError, "generate: most is a float; pass a whole number"),
        ({"samples": 0}, ValueError, "generate: samples is 0; pass 1 or more"),
        ({"temperature": -0.5}, ValueError, "generate: temperature is -0.5"),
        ({"top_p": 0}, ValueError, "generate: top_p is 0; pass"),
        ({"top_k": 0}, ValueError, "generate: top_k is 0; pass"),
        ({"stop": 3}, TypeError, "generate: stop is 3; pass a sequence of token ids"),
        ({"stop": "ab"}, TypeError, "generate: stop is 'ab'"),
        ({"stop": [2, 1.0]}, TypeError, "generate: stop has 1.0; pass token ids, whole numbers"),
        ({"stop": [None]}, TypeError, "generate: stop has None"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    prompts = fstep.make_docs([[1]])
    arguments: dict[str, Any] = {"decode": decode, "params": PARAMS, "prompts": prompts, "key": KEY, "most": 2, **change}
    with pytest.raises(error, match=message):
        fstep.generate(**arguments)


def test_prompts_that_cannot_be_answered() -> None:
    def refused(message: str, prompts: Docs) -> None:
        with pytest.raises(ValueError, match=message):
            fstep.generate(decode, PARAMS, prompts, KEY, most=2)

    docs = fstep.make_docs([[1, 2], [3]])
    refused("generate: prompt 1 is empty", dataclasses.replace(docs, lengths=torch.tensor([3, 0])))
    refused("two prompts have one index, .* pass samples=", dataclasses.replace(docs, index=torch.tensor([4, 4])))
    refused("prompts have targets 'old' for each token", dataclasses.replace(docs, targets={"old": torch.zeros(3)}))
    refused("prompts have inputs 'image' for each token", dataclasses.replace(docs, inputs={"image": torch.zeros(3)}))
    refused(r"prompts have per_document\['finished'\]", fstep.make_docs([[1]], per_document={"finished": [0]}))
