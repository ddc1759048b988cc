"""cp_shard and its way back: which rank holds which place, by plain lists; and losses of whole documents over ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Axis, Mesh, Packed
from fstep.testing import assert_pure
from fstep_models.dense import Config, Dense

LENGTHS = [1, 30, 3, 8, 9, 17]


def docs(lengths: list[int] = LENGTHS) -> fstep.Docs:
    """Every value says where it belongs: document, and place in it."""
    rows = [100 * d + torch.arange(n) for d, n in enumerate(lengths)]
    return fstep.make_docs(
        rows,
        weights=[0.5 + row % 7 for row in rows],
        targets={"advantage": [row * 1.5 for row in rows]},
        inputs={"image": [torch.stack([row, -row], dim=1) for row in rows]},
        per_document={"reward": torch.arange(len(lengths)) * 1.0},
    )


def shards(packed: Packed, size: int) -> list[Packed]:
    return fstep.simulate(lambda mesh: fstep.cp_shard(packed, axis=mesh.cp), cp=size)


def zigzag(values: Tensor, cu: list[int], rank: int, size: int) -> Tensor:
    """Chunks r and 2C-1-r of each document, with slices."""
    found = []
    for a, b in itertools.pairwise(cu):
        chunks = values[a:b].chunk(2 * size) if b > a else []
        found += [chunks[rank], chunks[2 * size - 1 - rank]] if chunks else []
    return torch.cat(found)


TOKEN_FIELDS: list[tuple[str, Callable[[Packed], Tensor]]] = [
    ("tokens", lambda p: p.tokens),
    ("labels", lambda p: p.labels),
    ("weights", lambda p: p.weights),
    ("positions", lambda p: p.positions),
    ("targets", lambda p: p.targets["advantage"]),
    ("inputs", lambda p: p.inputs["image"]),
]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("length", [None, 144])
def test_a_rank_holds_two_chunks_of_each_document(size: int, length: int | None) -> None:
    packed = fstep.pack_thd(docs(), multiple_of=2 * size, length=length)
    cu = packed.cu_seqlens_padded.tolist()
    for rank, part in enumerate(shards(packed, size)):
        for name, field in TOKEN_FIELDS:
            assert torch.equal(field(part), zigzag(field(packed), cu, rank, size)), name
        assert part.cu_seqlens_padded.tolist() == [n // size for n in cu]
        assert part.cu_seqlens_padded.dtype == torch.int32 and torch.equal(part.cu_seqlens, packed.cu_seqlens)
        assert part.max_seqlen == max(b - a for a, b in itertools.pairwise(cu)) // size
        assert part.parts == size
        assert torch.equal(part.index, packed.index) and part.per_document is packed.per_document


def test_every_place_is_held_once_and_labels_stay_with_their_place() -> None:
    packed = fstep.pack_thd(docs(), multiple_of=6)
    parts = shards(packed, 3)
    pairs = sorted((int(t), int(n)) for part in parts for t, n in zip(part.tokens, part.labels, strict=True))
    assert pairs == sorted(zip(packed.tokens.tolist(), packed.labels.tolist(), strict=True))
    assert sum(part.weights.sum() for part in parts) == packed.weights.sum()


def test_two_documents_by_hand() -> None:
    packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]), multiple_of=4)
    first, second = shards(packed, 2)
    assert first.tokens.tolist() == [1, 2, 7, 8, 9, 0] and second.tokens.tolist() == [3, 4, 5, 6, 10, 11]
    assert first.labels.tolist() == [2, 3, 8, -100, 10, -100] and second.labels.tolist() == [4, 5, 6, 7, 11, -100]
    assert first.positions.tolist() == [0, 1, 6, 7, 0, 0] and second.positions.tolist() == [2, 3, 4, 5, 1, 2]


def test_a_field_of_ones_own_is_cut_by_its_declaration() -> None:
    @fstep.pytree
    class Scored(Packed):
        score: Tensor = fstep.cut("token", kw_only=True)
        rank: Tensor = fstep.cut("document", kw_only=True)

    packed = fstep.pack_thd(docs(), multiple_of=4)
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    mine = Scored(**fields, score=packed.tokens * 2.0, rank=torch.arange(6))
    for rank, part in enumerate(shards(mine, 2)):
        assert torch.equal(part.score, zigzag(mine.score, packed.cu_seqlens_padded.tolist(), rank, 2))
        assert part.rank is mine.rank


def test_one_rank_holds_the_row() -> None:
    packed = fstep.pack_thd(docs(), multiple_of=2 * Mesh().cp.size)
    axis = Mesh().cp
    assert fstep.cp_shard(packed, axis=axis) is packed and packed.parts == 1
    x = packed.weights
    assert fstep.cp_unshard(x, packed, axis=axis, grad="sum") is x
    assert fstep.cp_gather_logprobs(x, packed, axis=axis, grad="slice") is x


def test_documents_that_do_not_divide() -> None:
    packed = fstep.pack_thd(docs([8, 30]), multiple_of=2)
    message = r"cp_shard: 30 tokens do not divide into 2\*cp=8 chunks \(document 1 with its padding\); pack with "
    with pytest.raises(ValueError, match=message + r"pack_thd\(multiple_of=8\)"):
        fstep.cp_shard(packed, axis=Axis("cp", 4))
    with pytest.raises(ValueError, match=r"cp_shard: 12 tokens do not divide into 2\*cp=8 chunks"):
        fstep.cp_shard(fstep.pack_thd(docs([12])), axis=Axis("cp", 4))  # into 4 parts they would
    assert len(fstep.cp_shard(fstep.pack_thd(docs([8, 30]), multiple_of=8), axis=Axis("cp", 4)).tokens) == 10


def test_a_shard_is_no_row() -> None:
    packed = fstep.pack_thd(docs([1, 2]), multiple_of=16)  # so much padding that lengths do not show it
    part = shards(packed, 2)[0]
    with pytest.raises(ValueError, match="cp_shard: the row is one of 2 shards already; pass what pack_thd returns"):
        fstep.cp_shard(part, axis=Axis("cp", 2))
    message = "packed is one of 2 shards, in which no document is whole; pass the row that cp_shard was given"
    with pytest.raises(ValueError, match=f"unpack_thd: {message}"):
        fstep.unpack_thd(part)
    with pytest.raises(ValueError, match=f"split_documents: {message}"):
        fstep.split_documents(part.weights, part)


def test_inputs_are_not_changed() -> None:
    packed = fstep.pack_thd(docs(), multiple_of=4)
    assert_pure(lambda p: shards(p, 2), packed)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_unshard_is_the_inverse(size: int) -> None:
    packed = fstep.pack_thd(docs(), multiple_of=2 * size, length=144)

    def f(mesh: Mesh) -> list[Any]:
        part = fstep.cp_shard(packed, axis=mesh.cp)
        back = fstep.cp_unshard({n: field(part) for n, field in TOKEN_FIELDS}, part, axis=mesh.cp, grad="slice")
        return [back, fstep.cp_gather_logprobs(part.weights, part, axis=mesh.cp, grad="sum")]

    for back, weights in fstep.simulate(f, cp=size):
        for name, field in TOKEN_FIELDS:
            assert torch.equal(back[name], field(packed)), name
        assert torch.equal(weights, packed.weights)


@pytest.mark.parametrize("grad", ["sum", "slice"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("function", [fstep.cp_unshard, fstep.cp_gather_logprobs])
def test_transpose(function: Callable[..., Tensor], size: int, grad: str) -> None:
    """<f(x), y> over the ranks is <x, fT(y)>; a gradient that is the same on all ranks ("slice") counts once."""
    packed = fstep.pack_thd(docs(), multiple_of=2 * size)
    T = len(packed.tokens)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, dtype=torch.float64, generator=generator)
    ys = torch.randn(size, T, dtype=torch.float64, generator=generator)
    ys = ys[:1].expand_as(ys) if grad == "slice" else ys
    cu = packed.cu_seqlens_padded.tolist()

    def f(mesh: Mesh) -> tuple[Tensor, Tensor]:
        part, own = fstep.cp_shard(packed, axis=mesh.cp), zigzag(x, cu, mesh.cp.rank, size)
        out, pull = fstep.vjp(lambda own: function(own, part, axis=mesh.cp, grad=grad), own)
        assert torch.equal(out, x)
        (back,) = pull(ys[mesh.cp.rank])
        total = ys[0] if grad == "slice" else ys.sum(0)
        torch.testing.assert_close(back, zigzag(total, cu, mesh.cp.rank, size), rtol=1e-12, atol=1e-12)
        return (out * ys[mesh.cp.rank]).sum(), (own * back).sum()

    left, right = zip(*fstep.simulate(f, cp=size), strict=True)
    once = left[0] if grad == "slice" else sum(left)
    torch.testing.assert_close(once, sum(right), rtol=1e-12, atol=1e-12)


# A loss of whole documents: how much likelier each is than a bar, through a sigmoid. It is no sum over tokens. ------------


def model(params: dict[str, Tensor], part: Packed) -> Tensor:
    hidden = torch.tanh(params["embed"][part.tokens % 13] + 0.1 * part.positions[:, None])
    return fstep.token_logprobs(hidden, params["head"], part.labels % 11)


def document_loss(logp: Tensor, row: Packed) -> list[Tensor]:
    sums = [part.sum() for part in fstep.split_documents(logp * row.weights, row)]
    return [-torch.sigmoid(0.01 * total + row.per_document["reward"][i]) for i, total in enumerate(sums)]


def setting(size: int) -> tuple[dict[str, Tensor], Packed]:
    generator = torch.Generator().manual_seed(3)
    params = {name: torch.randn(n, 4, dtype=torch.float64, generator=generator) for name, n in (("embed", 13), ("head", 11))}
    return params, fstep.cast(fstep.pack_thd(docs(), multiple_of=2 * size), torch.float64)


def one_process(size: int) -> tuple[Any, Any]:
    params, packed = setting(size)

    def loss(p: dict[str, Tensor]) -> tuple[Tensor, fstep.Ratio]:
        terms = document_loss(model(p, packed), packed)
        return sum(terms), fstep.Ratio(sum(terms), torch.tensor(float(len(terms)), dtype=torch.float64))

    (_, ratio), grads = fstep.value_and_grad(loss, has_aux=True)(params)
    return fstep.finalize_grads(grads, fstep.tree_map(torch.detach, ratio), mesh=Mesh())


def alike(logp: Tensor, packed: Packed, part: Packed, axis: Axis) -> tuple[Tensor, Tensor]:
    """Every rank computes the whole loss."""
    terms = document_loss(fstep.cp_gather_logprobs(logp, part, axis=axis, grad="slice"), packed)
    return fstep.as_partial((sum(terms), torch.tensor(float(len(terms)), dtype=torch.float64)), axis=axis)


def divided(logp: Tensor, packed: Packed, part: Packed, axis: Axis) -> tuple[Tensor, Tensor]:
    """Every rank computes the loss of some documents."""
    whole = fstep.cp_gather_logprobs(logp, part, axis=axis, grad="sum")
    terms = document_loss(whole, packed)[axis.rank :: axis.size]
    # Its gradient communicates: a rank without documents takes part, too.
    return 0 * whole.sum() + sum(terms), torch.tensor(float(len(terms)), dtype=torch.float64)


def wrong_grad(logp: Tensor, packed: Packed, part: Packed, axis: Axis) -> tuple[Tensor, Tensor]:
    terms = document_loss(fstep.cp_gather_logprobs(logp, part, axis=axis, grad="sum"), packed)
    return fstep.as_partial((sum(terms), torch.tensor(float(len(terms)), dtype=torch.float64)), axis=axis)


def over_ranks(size: int, terms_of: Callable[..., tuple[Tensor, Tensor]]) -> list[tuple[Any, Any]]:
    def f(mesh: Mesh) -> tuple[Any, Any]:
        params, packed = setting(size)
        part = fstep.cp_shard(packed, axis=mesh.cp)

        def loss(p: dict[str, Tensor]) -> tuple[Tensor, fstep.Ratio]:
            num, den = terms_of(model(p, part), packed, part, mesh.cp)
            return num, fstep.Ratio(num, den)

        (_, ratio), grads = fstep.value_and_grad(loss, has_aux=True)(params)
        return fstep.finalize_grads(grads, fstep.tree_map(torch.detach, ratio), mesh=mesh)

    return fstep.simulate(f, cp=size)


@pytest.mark.parametrize("terms_of", [alike, divided])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_loss_of_whole_documents_equals_one_process(size: int, terms_of: Callable[..., Any]) -> None:
    want, want_metrics = one_process(size)
    for grads, metrics in over_ranks(size, terms_of):
        for name, g in want.items():
            torch.testing.assert_close(grads[name], g, rtol=1e-12, atol=1e-14)
        for name in ("loss", "weight", "grad_norm"):
            torch.testing.assert_close(metrics[name], want_metrics[name], rtol=1e-12, atol=0)


def test_the_other_transpose_is_off_by_the_number_of_ranks() -> None:
    """The value of the loss does not show it."""
    want, want_metrics = one_process(3)
    for grads, metrics in over_ranks(3, wrong_grad):
        torch.testing.assert_close(metrics["loss"], want_metrics["loss"], rtol=1e-12, atol=0)
        for name, g in want.items():
            torch.testing.assert_close(grads[name], 3 * g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", [dict(cp=2), dict(cp=4), dict(pp=2, cp=2), dict(dp=2, cp=2), dict(pp=2, cp=2, tp=2)])
def test_evaluation_gives_the_loss_of_one_process(sizes: dict[str, int]) -> None:
    config = Config(
        family="qwen3", vocab=37, dim=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=4,
        rope=fstep.Rope(theta=1e4, dim=4), windows=(0, 3), tied=True, qk_norm=True, init_std=0.3,
    )  # fmt: skip
    model = Dense(config)
    params = model.init(fstep.Key.seed(0), dtype=torch.float64)
    held_out = fstep.make_docs([torch.arange(n) % 37 for n in (5, 11, 1, 3, 8)])

    def validation(mesh: Mesh) -> tuple[float, float]:
        mine, chunks = fstep.divide_documents(held_out, axis=mesh.dp), 2 * mesh.cp.size
        rows = [fstep.pack_thd(part, multiple_of=chunks) for part in fstep.split_microbatches(mine, num=2)]
        batch = [fstep.cast(fstep.cp_shard(row, axis=mesh.cp), torch.float64) for row in rows]
        score = lambda p, x, mb: fstep.sft_loss(model.logprobs(p, x, mb, mesh=mesh), mb.weights)  # noqa: E731
        own = model.part(params, mesh=mesh)
        losses = fstep.pp_forward(model.stage(mesh), score, own, batch, axis=mesh.pp)
        total = fstep.psum(losses[0] + losses[1], axis=mesh.over("dp", "cp"))
        return float(total.num), float(total.den)

    alone = validation(Mesh())
    assert alone[1] == 23.0  # every token but each document's first
    for got in fstep.simulate(validation, **sizes):
        assert got == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(packed=None), TypeError, "{}: packed is a NoneType; pass what cp_shard returns"),
        (dict(grad="both"), ValueError, "{}: grad is 'both'; pass \"sum\" if the loss is a partial sum over the axis, "),
        (dict(x=torch.zeros(3)), ValueError, r"{}: x has shape \(3,\), and the shard 4 places; give one entry a place"),
        (dict(x=[1.0]), TypeError, "{}: x is a float; pass a tensor with one entry a place"),
        (
            dict(axis=Axis("cp", 4)),
            ValueError,
            r"{}: packed is one of 2 shards, and axis 'cp' has 4 ranks; pass what cp_shard",
        ),
        (dict(axis=Axis("cp")), ValueError, r"{}: packed is one of 2 shards, and axis 'cp' has 1 ranks; pass what cp_shard"),
        (
            dict(packed="whole"),
            ValueError,
            r"{}: packed is a whole row, and axis 'cp' has 2 ranks; pass what cp_shard\(axis",
        ),
    ],
)
@pytest.mark.parametrize("function", [fstep.cp_unshard, fstep.cp_gather_logprobs])
def test_bad_input(function: Callable[..., Any], arguments: dict, error: type[Exception], message: str) -> None:
    whole = fstep.pack_thd(docs([3, 2]), multiple_of=4)
    part = fstep.cp_shard(whole, axis=Axis("cp", 2))
    given = dict(x=torch.zeros(4), packed=part, axis=Axis("cp", 2), grad="sum") | arguments
    given["packed"] = whole if arguments.get("packed") == "whole" else given["packed"]
    with pytest.raises(error, match=message.format(function.__name__)):
        function(given["x"], given["packed"], axis=given["axis"], grad=given["grad"])


def test_hidden_states_are_not_gathered_as_logprobs() -> None:
    part = fstep.cp_shard(fstep.pack_thd(docs([3, 2]), multiple_of=4), axis=Axis("cp", 2))
    with pytest.raises(ValueError, match=r"logp has shape \(4, 64\); pass one number a token, or gather more of them with "):
        fstep.cp_gather_logprobs(torch.zeros(4, 64), part, axis=Axis("cp", 2), grad="sum")


def test_documents_that_are_not_packed_are_refused() -> None:
    with pytest.raises(TypeError, match="cp_shard: packed is a Docs; pass what pack_thd returns"):
        fstep.cp_shard(docs(), axis=Mesh().cp)
