"""Packing against a slow loop over tokens, its inverse, its gradients, and the rows it has to refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fstep
import fstep.testing
from tests.batch.cases import IGNORE, Media, assert_same, draw, per_document, random_docs, random_media


def slow_pack(batch: fstep.Docs, multiple_of: int, length: int | None) -> dict[str, Any]:
    """Pack one token at a time, from the definition: what stands at a place, what follows it, and where it is."""
    documents = per_document(batch)
    row: dict[str, list[Any]] = {name: [] for name in ("tokens", "labels", "weights", "positions")}
    row |= {f"targets.{k}": [] for k in batch.targets} | {f"inputs.{k}": [] for k in batch.inputs}
    zero = {f"targets.{k}": v.new_zeros(1, *v.shape[1:]).tolist() for k, v in batch.targets.items()}
    zero |= {f"inputs.{k}": v.new_zeros(1, *v.shape[1:]).tolist() for k, v in batch.inputs.items()}
    real, padded = [0], [0]

    def pad() -> None:
        for name in row:
            row[name] += [IGNORE] if name == "labels" else zero.get(name, [0])

    for d in documents:
        n = len(d["tokens"])
        for t in range(n):
            last = t == n - 1
            row["tokens"].append(d["tokens"][t])
            row["labels"].append(IGNORE if last else d["tokens"][t + 1])
            row["weights"].append(0 if last else d["weights"][t + 1])
            row["positions"].append(t)
            for name in row:
                if name.startswith("targets."):  # about predicting the next token; the last place keeps the first one's
                    row[name].append(d[name][0 if last else t + 1])
                elif name.startswith("inputs."):
                    row[name].append(d[name][t])
        real.append(real[-1] + n)
        while len(row["tokens"]) % multiple_of:
            pad()
        padded.append(len(row["tokens"]))
    while len(row["tokens"]) < (multiple_of if length is None else length):
        pad()
    if not documents:
        real, padded = [0, 0], [0, 0]
    padded[-1] = len(row["tokens"])
    return {**row, "cu_seqlens": real, "cu_seqlens_padded": padded}


def as_lists(packed: fstep.Packed) -> dict[str, Any]:
    names = ("tokens", "labels", "weights", "positions", "cu_seqlens", "cu_seqlens_padded")
    return {
        **{name: getattr(packed, name).tolist() for name in names},
        **{f"targets.{k}": v.tolist() for k, v in packed.targets.items()},
        **{f"inputs.{k}": v.tolist() for k, v in packed.inputs.items()},
    }


CASES: dict[str, fstep.Docs] = {
    **{f"random {seed}": random_docs(seed) for seed in range(12)},
    "one token each": random_docs(20, [1, 1, 1]),
    "one token": random_docs(21, [1]),
    "one token at the end": random_docs(22, [4, 1]),
    "one token in front": random_docs(23, [1, 4]),
    "exact multiples": random_docs(24, [4, 8, 4]),
    "a selection": fstep.select_documents(random_docs(25, [3, 1, 5, 2]), [2, 0, 2]),
    "an empty selection": fstep.select_documents(random_docs(26), []),
    "nothing": fstep.make_docs([]),
}
CASES["all masked"] = dataclasses.replace(CASES["random 1"], weights=torch.zeros_like(CASES["random 1"].weights))


@pytest.mark.parametrize("spare", [None, 0, 1, 5])
@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_pack_is_the_slow_loop_and_unpack_inverts_it(name: str, multiple_of: int, spare: int | None) -> None:
    batch = CASES[name]
    least = sum(-(-n // multiple_of) * multiple_of for n in batch.lengths.tolist())
    length = None if spare is None else max(least + spare * multiple_of, multiple_of)
    packed = fstep.testing.assert_pure(fstep.pack_thd, batch, multiple_of=multiple_of, length=length)

    assert as_lists(packed) == slow_pack(batch, multiple_of, length)
    assert packed.cu_seqlens.dtype == packed.cu_seqlens_padded.dtype == torch.int32
    assert packed.tokens.dtype == packed.labels.dtype == packed.positions.dtype == torch.int64
    assert packed.weights.dtype == batch.weights.dtype
    for kind in ("targets", "inputs", "per_document"):
        for k, v in getattr(batch, kind).items():
            assert getattr(packed, kind)[k].dtype == v.dtype, k
    assert packed.max_seqlen == max(packed.cu_seqlens_padded.diff().tolist())
    assert packed.shared is batch.shared and torch.equal(packed.index, batch.index)
    assert len(packed.tokens) == length or length is None

    assert_same(fstep.testing.assert_pure(fstep.unpack_thd, packed), batch)


def test_the_picture_of_the_documentation() -> None:
    a, b, c, d, e = range(1, 6)
    packed = fstep.pack_thd(fstep.make_docs([[a, b, c], [d, e]]), multiple_of=4)
    assert packed.tokens.tolist() == [a, b, c, 0, d, e, 0, 0]
    assert packed.labels.tolist() == [b, c, IGNORE, IGNORE, e, IGNORE, IGNORE, IGNORE]
    assert packed.weights.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert packed.cu_seqlens.tolist() == [0, 3, 5] and packed.cu_seqlens_padded.tolist() == [0, 4, 8]
    assert packed.max_seqlen == 4


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_cross_documents(seed: int) -> None:
    # Tokens say which document they are of, so that a label from elsewhere shows.
    lengths = draw(seed, 1, 5, 6)
    packed = fstep.pack_thd(
        fstep.make_docs([[10 * (d + 1) + t for t in range(n)] for d, n in enumerate(lengths)]), multiple_of=2
    )
    counted = packed.labels != IGNORE
    assert int(counted.sum()) == sum(n - 1 for n in lengths)
    assert torch.equal(packed.labels[counted], packed.tokens[counted] + 1)
    assert torch.equal(packed.weights != 0, counted)


def test_weights_add_up_to_those_given() -> None:
    for batch in CASES.values():
        packed = fstep.pack_thd(batch, multiple_of=4)
        assert float(packed.weights.sum()) == pytest.approx(float(batch.weights.sum()), rel=1e-12)


def test_a_weight_given_to_a_first_token_never_counts() -> None:
    # Weights put in later, as ones for instance, may be anything at first tokens: no place predicts those.
    batch = dataclasses.replace(fstep.make_docs([[1, 2, 3], [4], [5, 6]]), weights=torch.ones(6))
    packed = fstep.pack_thd(batch, multiple_of=4, length=16)
    assert packed.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1] + [0] * 7


def test_gradients_flow_through_targets_both_ways() -> None:
    advantage = torch.arange(1.0, 7.0, dtype=torch.float64, requires_grad=True)
    batch = dataclasses.replace(fstep.make_docs([[1, 2, 3], [4], [5, 6]]), targets={"a": advantage})
    packed = fstep.pack_thd(batch, multiple_of=2)
    # Places: 2 3 | (1) 0 | (4) 0 | 6 (5): coefficient i+1 goes to the token that place i is about.
    coefficients = torch.arange(1.0, 9.0, dtype=torch.float64)
    (g,) = torch.autograd.grad((packed.targets["a"] * coefficients).sum(), advantage)
    assert g.tolist() == [3, 1, 2, 5, 8, 7]
    back = fstep.unpack_thd(fstep.pack_thd(batch, multiple_of=4, length=16)).targets["a"]
    (g,) = torch.autograd.grad((back * coefficients[:6]).sum(), advantage)
    assert g.tolist() == [1, 2, 3, 4, 5, 6]


def test_pads_pass_no_gradient_even_next_to_infinities() -> None:
    value = torch.full((3,), torch.inf, requires_grad=True)
    packed = fstep.pack_thd(dataclasses.replace(fstep.make_docs([[1, 2, 3]]), inputs={"x": value}), multiple_of=8)
    assert packed.inputs["x"].tolist() == [torch.inf] * 3 + [0] * 5
    (g,) = torch.autograd.grad(packed.inputs["x"].sum(), value)
    assert g.tolist() == [1, 1, 1]


def test_targets_under_vmap_and_grad() -> None:
    docs = fstep.make_docs([[1, 2, 3], [4, 5]])

    def total(values: torch.Tensor) -> torch.Tensor:
        packed = fstep.pack_thd(dataclasses.replace(docs, targets={"v": values}), multiple_of=4)
        return (packed.targets["v"] ** 2 * packed.weights).sum()

    many = torch.arange(15.0).reshape(3, 5)
    # Those of predicted tokens count: all but the first of each document.
    assert torch.func.vmap(total)(many).tolist() == [float((row[[1, 2, 4]] ** 2).sum()) for row in many]
    assert torch.func.grad(total)(many[0]).tolist() == [0, 2, 4, 0, 8]


@pytest.mark.parametrize("seed", range(4))
def test_split_documents(seed: int) -> None:
    batch = random_docs(seed)
    packed = fstep.pack_thd(batch, multiple_of=4, length=80)
    parts = fstep.split_documents(packed.tokens, packed)
    assert [p.tolist() for p in parts] == [d["tokens"] for d in per_document(batch)]
    wide = fstep.split_documents(torch.stack([packed.positions, packed.positions], dim=1), packed)
    assert [p[:, 1].tolist() for p in wide] == [list(range(n)) for n in batch.lengths.tolist()]


def test_split_documents_of_none_and_of_the_wrong_number() -> None:
    assert fstep.split_documents(torch.zeros(4), fstep.pack_thd(fstep.make_docs([]), multiple_of=4)) == ()
    packed = fstep.pack_thd(fstep.make_docs([[1, 2]]), multiple_of=4)
    with pytest.raises(ValueError, match="split_documents: values has 2 entries for 4 places; give one a place"):
        fstep.split_documents(torch.zeros(2), packed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(multiple_of=0), "multiple_of is 0; pass 1 or more"),
        (dict(length=0), "length 0 is no positive multiple of multiple_of=1"),
        (dict(multiple_of=4, length=14), "length 14 is no positive multiple of multiple_of=4"),
        (dict(length=5), r"3 documents need 6 tokens \(each padded to a multiple of 1\) and length is 5; pack fewer"),
        (dict(multiple_of=4, length=8), r"3 documents need 12 tokens .* length is 8; .*split_microbatches\(max_tokens=8\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^pack_thd: {message}"):
        fstep.pack_thd(fstep.make_docs([[1, 2, 3], [4], [5, 6]]), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets={"a": torch.zeros(7)}), "targets.a has 7 entries and the batch 6 tokens; give one for each"),
        (dict(inputs={"a": torch.zeros(5)}), "inputs.a has 5 entries and the batch 6 tokens"),
        (dict(weights=torch.zeros(7)), "weights has 7 entries"),
        (dict(tokens=torch.zeros(7, dtype=torch.int64)), "tokens has 7 entries"),
        (dict(per_document={"r": torch.zeros(2)}), "per_document.r has 2 entries and the batch 3 documents"),
        (dict(lengths=torch.tensor([3, 0, 3])), "document 1 has 0 tokens; leave empty ones out"),
        (dict(lengths=torch.tensor([4, -1, 3])), "document 1 has -1 tokens"),
    ],
)
def test_a_batch_that_is_inconsistent_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^pack_thd: {message}"):
        fstep.pack_thd(dataclasses.replace(fstep.make_docs([[1, 2, 3], [4], [5, 6]]), **change))


def test_fields_a_row_has_no_place_for_are_not_lost_silently() -> None:
    media = random_media(0)
    with pytest.raises(TypeError, match="pack_thd: a row has no place for items, sizes, captions, patches, width of Media"):
        fstep.pack_thd(media)
    names = [f.name for f in dataclasses.fields(fstep.Docs)]
    text = fstep.Docs(**{name: getattr(media, name) for name in names})
    assert_same(fstep.unpack_thd(fstep.pack_thd(text)), text)
    assert isinstance(media, Media)


def test_cost_does_not_grow_with_python_loops_over_tokens() -> None:
    # 20,000 documents of 50 tokens: a loop over a million tokens in Python takes seconds.
    calls = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += 1
            return func(*args, **(kwargs or {}))

    batch = fstep.make_docs([torch.full((50,), d) for d in range(20_000)])
    with Count():
        packed = fstep.pack_thd(batch, multiple_of=64)
        fstep.unpack_thd(packed)
    assert len(packed.tokens) == 20_000 * 64
    assert calls < 200


def test_with_targets_adds_and_replaces_and_changes_nothing() -> None:
    docs = fstep.make_docs([[1, 2, 3], [4, 5]], targets={"old": [[0.0, 1.0, 2.0], [0.0, 3.0]]})
    new = torch.arange(10.0).view(5, 2)
    found = fstep.with_targets(docs, new=new, batch=new[:, 0])
    assert found.targets["new"] is new and found.targets["batch"].equal(new[:, 0])
    assert found.targets["old"].equal(docs.targets["old"]) and list(docs.targets) == ["old"]
    assert found.tokens is docs.tokens
    row = fstep.pack_thd(found, multiple_of=4)
    assert row.targets["new"][0].equal(new[1])  # about the label there, token 2
    again = fstep.with_targets(row, old=-row.targets["old"])
    assert fstep.unpack_thd(again).targets["old"].equal(-docs.targets["old"])
    assert fstep.unpack_thd(again).targets["new"].equal(new)


def test_with_targets_names_what_does_not_fit() -> None:
    docs = fstep.make_docs([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"with_targets: x has shape \(2,\) and the batch 3 tokens; give one"):
        fstep.with_targets(docs, x=torch.zeros(2))
    with pytest.raises(ValueError, match=r"x has shape \(\) and the batch 3 tokens"):
        fstep.with_targets(docs, x=torch.tensor(1.0))
    with pytest.raises(TypeError, match="with_targets: x is a list; pass a tensor"):
        fstep.with_targets(docs, x=[1.0, 2.0, 3.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="with_targets: batch is a dict; pass what"):
        fstep.with_targets({}, x=torch.zeros(3))  # type: ignore[type-var]
