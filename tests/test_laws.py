"""The laws that every public transform keeps, in one table.

Each row is a function and example arguments in a given dtype. Every row is tried for

    pure        no argument changes: not its bits, its version, its .grad; torch's random state stays where it was
    dtype       floats come out as they went in, in float64, float32 and bfloat16 (or as the row says)
    structure   what should look like an argument does: same paths, same shapes
    slope       the gradient is that of the function, by central differences in float64
    grad        torch.func.grad of it equals torch.autograd.grad
    vmap        torch.func.vmap over every float argument equals a loop

A new public name goes into a row, or into EXEMPT with the reason why the laws say nothing about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Key, Ratio, tree_leaves, tree_map, tree_paths, tree_replace_leaves

Make = Callable[[torch.dtype], tuple[Any, ...]]


def same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Row:
    """``make(dtype)`` returns the function and its arguments; the float leaves of that dtype are the variables."""

    names: str  # the public names it is about
    make: Make
    dtype: Callable[[torch.dtype], torch.dtype] = same
    like: int | None = None  # the result has the structure and shapes of this argument
    no_slope: str = ""  # why central differences say nothing
    no_vmap: str = ""


def randn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return Key.seed(seed).normal(shape, dtype=torch.float64).to(dtype)


def docs(dtype: torch.dtype, seed: int = 0) -> fstep.Docs:
    """Four documents of 3, 1, 5 and 2 tokens; weights, targets and inputs are floats of one dtype."""
    made = fstep.make_docs(
        [[1, 2, 3], [4], [5, 6, 7, 0, 1], [2, 3]], targets={"n": [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2]]}
    )
    weights = randn(seed, 11, dtype=dtype).abs().masked_fill(made.weights == 0, 0)
    advantage = {**made.targets, "advantage": randn(seed + 1, 11, dtype=dtype)}
    return dataclasses.replace(made, weights=weights, targets=advantage, inputs={"x": randn(seed + 2, 11, 2, dtype=dtype)})


def params(dtype: torch.dtype) -> dict[str, Any]:
    layer = {"q": randn(3, 4, 4, dtype=dtype), "norm": randn(4, 4, dtype=dtype)}
    return {"embed": randn(5, 8, 4, dtype=dtype), "layers": {0: layer}, "head": fstep.Tied("embed"), "ids": torch.arange(3)}


def stage(p: Any, x: Any, mb: fstep.Packed) -> Tensor:
    """A model of one layer: embedding, attention, norm."""
    h = fstep.embed(mb.tokens, p["embed"])
    q = fstep.linear(h, p["layers"][0]["q"]).reshape(-1, 2, 2)
    # Gradients of gradients are taken of it, which needs the method of plain operations.
    h = h + fstep.packed_attention(q, q, q, mb.cu_seqlens_padded, max_seqlen=mb.max_seqlen, method="math").flatten(1)
    return fstep.rms_norm(h, p["layers"][0]["norm"], eps=1e-6)


def loss(p: Any, x: Tensor, mb: fstep.Packed) -> Ratio:
    return fstep.sft_loss(fstep.token_logprobs(x, p["embed"], mb.labels), mb.weights)


def microbatches(dtype: torch.dtype) -> list[fstep.Packed]:
    return [fstep.pack_thd(part, multiple_of=4) for part in fstep.split_microbatches(docs(dtype), num=2)]


def trained_state(opt: Any, dtype: torch.dtype) -> tuple[Any, fstep.TrainState]:
    """Gradients, and a state after one update, so that no moment is zero."""
    p = {"embed": randn(6, 3, 4, dtype=dtype), "layers": {0: {"q": randn(7, 4, 4, dtype=dtype)}}, "frozen": torch.ones(2)}
    state = fstep.init_state(p, opt, trainable=lambda path: path != "frozen")
    grads = {"embed": randn(8, 3, 4, dtype=dtype), "layers": {0: {"q": randn(9, 4, 4, dtype=dtype)}}, "frozen": None}
    return grads, opt.update(state, tree_map(lambda g: g.flip(0), grads), lr=0.1)


def optimizer(opt: Any) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        grads, state = trained_state(opt, dtype)
        frozen, rest = state.params["frozen"], {k: v for k, v in state.params.items() if k != "frozen"}

        def update(p: Any, g: Any, memory: Any) -> Any:
            new = opt.update(dataclasses.replace(state, params={**p, "frozen": frozen}, opt=memory), g, lr=0.1)
            return {k: v for k, v in new.params.items() if k != "frozen"}

        return update, rest, grads, state.opt

    return make


def module_of(dtype: torch.dtype) -> tuple[Any, ...]:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).to(dtype)
    weights, apply = fstep.lift(module)
    return apply, weights, randn(10, 5, 4, dtype=dtype)


def quadratic(p: Any, x: Tensor) -> Tensor:
    return (torch.tanh(p["w"] @ x) ** 2).sum()


def step(name: str, **options: Any) -> Row:
    """A learning rate: a function of a float step, so that its slope can be looked at."""
    schedule = getattr(fstep, name)
    return Row(
        name,
        lambda dtype: (lambda s: schedule(s, peak=0.5, **options), torch.tensor(5.25, dtype=dtype)),
        dtype=at_least_float32,
    )


def attend(**options: Any) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        cu = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
        q, k, v = (randn(i, 9, heads, 8, dtype=dtype) for i, heads in ((11, 4), (12, 2), (13, 2)))
        return (lambda q, k, v: fstep.packed_attention(q, k, v, cu, max_seqlen=4, **options)), q, k, v

    return make


def tables(kind: str) -> Make:
    rope = fstep.Rope(theta=100.0, dim=6, kind=kind, factor=2.0, trained_length=4)
    positions, lengths = torch.arange(5), torch.full((5,), 5)

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        def turn(x: Tensor) -> Tensor:
            return fstep.rotate(x, *fstep.rope_tables(rope, positions, lengths=lengths, dtype=x.dtype))

        return turn, randn(14, 5, 2, 6, dtype=dtype)

    return make


LABELS = torch.tensor([3, -100, 0, 4, 1])


def two_documents(weights: Any, values: Any) -> Any:
    made = fstep.make_docs([[1, 2], [3]], weights=weights, targets={"t": values})
    return made.weights, made.targets


def split_at(dtype: torch.dtype) -> tuple[Any, ...]:
    packed = fstep.pack_thd(docs(dtype), multiple_of=4)
    return (lambda x: fstep.split_documents(x, packed)), randn(1, 20, dtype=dtype)


def double(tree: Any) -> Any:
    return tree_replace_leaves(tree, [x * 2 for x, _ in zip(tree_leaves(tree), tree_paths(tree), strict=True)])


def not_ids(path: str) -> bool:
    return path != "ids"


def first_state(p: Any) -> Any:
    state = fstep.init_state(p, fstep.adamw, trainable=not_ids)
    return state.params, state.opt.mu, state.opt.nu


def draws(dtype: torch.dtype) -> tuple[Any, ...]:
    def draw(k: Key) -> Any:
        return (
            k.uniform((2,), dtype=dtype),
            k.normal((2,), dtype=dtype),
            k.fold_in(3),
            k.split(2),
            k.permutation(4),
            k.bits((2,)),
        )

    return draw, Key.seed(2)


def at_1_2(dtype: torch.dtype) -> tuple[Any, ...]:
    """Params of one matrix, and an input of 4 numbers."""
    return {"w": randn(1, 3, 4, dtype=dtype)}, randn(2, 4, dtype=dtype)


def by_document(f: Callable[..., Any]) -> Make:
    """Give a loss sums [documents], below 0, of two pairs."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        pairs = torch.tensor([7, 2, 7, 2]), torch.tensor([True, False, False, True])
        sums = Ratio(-randn(1, 4, dtype=dtype).abs() - 0.1, torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=dtype))
        return (lambda x: f(x, fstep.find_pairs(*pairs))), sums

    return make


def over_tokens(f: Callable[..., Any]) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        packed = fstep.pack_thd(docs(dtype), multiple_of=2)
        return (lambda x: f(x, packed, axis=fstep.Mesh().cp)), randn(1, len(packed.tokens), dtype=dtype)

    return make


def distill(top: bool, **options: Any) -> Make:
    """The teacher's are no variables: it has no gradient."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        teacher = (randn(3, 5, 3, dtype=dtype), randn(4, 6, 3, dtype=dtype))
        if top:
            ids = torch.arange(10).reshape(5, 2) % 6
            teacher = (ids, (teacher[0] @ teacher[1].T).log_softmax(-1).gather(-1, ids))
        f = fstep.topk_distill_loss if top else fstep.distill_loss
        weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=dtype)
        return (lambda h, w, x: f(h, w, *teacher, x, temperature=0.7, **options)), *hidden_and_head(dtype), weights

    return make


def hidden_and_head(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(1, 5, 4, dtype=dtype), randn(2, 6, 4, dtype=dtype)


ROWS: dict[str, Row] = {
    # tree, ratio
    "cast to float32": Row(
        "cast",
        lambda d: (lambda t: fstep.cast(t, torch.float32), params(d)),
        dtype=lambda d: torch.float32,
        like=0,
        no_slope="rounds",
    ),
    "cast to nothing": Row("cast", lambda d: (lambda t: fstep.cast(t, None), params(d)), like=0),
    "to_device": Row("to_device", lambda d: (lambda t: fstep.to_device(t, "cpu"), params(d)), like=0),
    "tree_map": Row("tree_map", lambda d: (lambda t, u: tree_map(torch.mul, t, u), params(d), params(d)), like=0),
    "tree_map_with_path": Row(
        "tree_map_with_path",
        lambda d: (lambda t: fstep.tree_map_with_path(lambda path, x: x * len(path), t), params(d)),
        like=0,
    ),
    "leaves": Row("tree_leaves tree_replace_leaves tree_paths", lambda d: (double, params(d)), like=0),
    "split and merge": Row(
        "split_trainable tree_merge",
        lambda d: (lambda t: fstep.tree_merge(*fstep.split_trainable(t, not_ids)), params(d)),
        like=0,
    ),
    "Ratio": Row(
        "Ratio",
        lambda d: (
            lambda a, b: (a + b).mean(),
            Ratio(randn(1, dtype=d), torch.tensor(2.0, dtype=d)),
            Ratio(randn(2, dtype=d), torch.tensor(3.0, dtype=d)),
        ),
    ),
    "Ratio of no weight": Row("Ratio", lambda d: (lambda n: Ratio(n, torch.tensor(0)).mean() + n, randn(1, dtype=d))),
    # batch
    "make_docs": Row(
        "make_docs",
        lambda d: (
            two_documents,
            [randn(1, 2, dtype=d), randn(2, 1, dtype=d)],
            [randn(3, 2, dtype=d), randn(4, 1, dtype=d)],
        ),
        no_vmap="looks at the weights, to refuse those that are not finite",
    ),
    "select_documents": Row("select_documents cut", lambda d: (lambda b: fstep.select_documents(b, [2, 0]), docs(d))),
    "join_documents": Row(
        "join_documents",
        lambda d: (
            lambda a, b: fstep.join_documents([a, b]),
            *(fstep.select_documents(docs(d), rows) for rows in ([2, 1], [0, 3])),
        ),
    ),
    "split_microbatches": Row("split_microbatches", lambda d: (lambda b: fstep.split_microbatches(b, num=3), docs(d))),
    "split and join": Row(
        "split_microbatches join_documents",
        lambda d: (lambda b: fstep.join_documents(fstep.split_microbatches(b, max_tokens=6)), docs(d)),
        like=0,
    ),
    "pack_thd": Row("pack_thd Packed Docs", lambda d: (lambda b: fstep.pack_thd(b, multiple_of=4, length=24), docs(d))),
    "unpack_thd": Row("unpack_thd", lambda d: (fstep.unpack_thd, fstep.pack_thd(docs(d), multiple_of=4))),
    "pack and unpack": Row(
        "pack_thd unpack_thd", lambda d: (lambda b: fstep.unpack_thd(fstep.pack_thd(b, multiple_of=3)), docs(d)), like=0
    ),
    "split_documents": Row("split_documents", split_at),
    "with_targets": Row("with_targets", lambda d: (lambda b, x: fstep.with_targets(b, x=x), docs(d), randn(3, 11, dtype=d))),
    "plans": Row(
        "plan_first_fit plan_balanced",
        lambda d: (lambda n: (fstep.plan_first_fit(n, 9), fstep.plan_balanced(n, 2)), torch.tensor([3, 7, 5, 2])),
    ),
    "draw_documents": Row(
        "draw_documents DataPosition",
        lambda d: (lambda p, k: fstep.draw_documents(p, num=5, of=3, key=k), fstep.DataPosition.start(), Key.seed(1)),
    ),
    "Key": Row("Key", draws),
    "Key.categorical": Row("Key", lambda d: (Key.seed(3).categorical, randn(1, 4, 5, dtype=d)), no_slope="an index"),
    "sample_tokens": Row(
        "sample_tokens",
        lambda d: (lambda x: fstep.sample_tokens(x, Key.seed(3).uniform((4,)), top_p=0.9), randn(1, 4, 5, dtype=d)),
        dtype=at_least_float32,
        no_slope="is detached",
    ),
    # ops
    "embed": Row("embed", lambda d: (lambda w: fstep.embed(torch.tensor([2, 0, 2]), w), randn(1, 3, 4, dtype=d))),
    "linear": Row("linear", lambda d: (fstep.linear, *hidden_and_head(d), randn(3, 6, dtype=d))),
    "rms_norm": Row(
        "rms_norm",
        lambda d: (lambda x, w: fstep.rms_norm(x, w, eps=1e-5), randn(1, 5, 4, dtype=d), randn(2, 4, dtype=d)),
        like=0,
    ),
    "rope": Row("rotate rope_tables Rope", tables("default"), like=0),
    "rope, dynamic": Row("rotate rope_tables Rope", tables("dynamic"), like=0),
    "packed_attention": Row("packed_attention", attend(), like=0),
    "packed_attention, window": Row("packed_attention", attend(window=2, scale=0.3), like=0),
    "packed_attention, documents": Row(
        "packed_attention", attend(method="documents"), like=0, no_vmap="torch has no batching rule for its kernel"
    ),
    "packed_attention, math": Row("packed_attention", attend(method="math"), like=0),
    "head_logits": Row(
        "head_logits",
        lambda d: (lambda h, w: fstep.head_logits(h, w, temperature=0.7), *hidden_and_head(d)),
        dtype=at_least_float32,
    ),
    "token_logprobs": Row(
        "token_logprobs",
        lambda d: (lambda h, w: fstep.token_logprobs(h, w, LABELS, temperature=0.7, entropy=True), *hidden_and_head(d)),
        dtype=at_least_float32,
    ),
    "token_logprob_sum": Row(
        "token_logprob_sum",
        lambda d: (
            lambda h, w, s: fstep.token_logprob_sum(h, w, LABELS, s, temperature=0.7),
            *hidden_and_head(d),
            randn(3, 5, dtype=d),
        ),
        dtype=at_least_float32,
    ),
    # loss
    "sft_loss": Row(
        "sft_loss", lambda d: (fstep.sft_loss, randn(1, 6, dtype=d), randn(2, 6, dtype=d).abs()), dtype=at_least_float32
    ),
    "dpo_loss": Row(
        "dpo_loss find_pairs Pairs",
        by_document(lambda x, p: fstep.dpo_loss(x, p, beta=0.5, label_smoothing=0.1)[0]),
        dtype=at_least_float32,
    ),
    "ipo_loss": Row("ipo_loss", by_document(lambda x, p: fstep.ipo_loss(x, p, beta=0.5)[0]), dtype=at_least_float32),
    "simpo_loss": Row(
        "simpo_loss", by_document(lambda x, p: fstep.simpo_loss(x, p, beta=2.0, margin=0.5)[0]), dtype=at_least_float32
    ),
    "orpo_loss": Row("orpo_loss", by_document(lambda x, p: fstep.orpo_loss(x, p, beta=0.5)[0]), dtype=at_least_float32),
    "chosen_nll": Row("chosen_nll", by_document(fstep.chosen_nll), dtype=at_least_float32),
    "kto_loss": Row(
        "kto_loss",
        by_document(lambda x, p: fstep.kto_loss(x, torch.tensor([1, 0, 0, 1]), beta=0.5, kl=0.1)[0]),
        dtype=at_least_float32,
    ),
    "kto_kl": Row("kto_kl", by_document(lambda x, p: fstep.kto_kl(x)), dtype=at_least_float32, no_slope="is detached"),
    "bradley_terry_loss": Row(
        "bradley_terry_loss",
        by_document(lambda x, p: fstep.bradley_terry_loss(x.num, p, margin=0.5, center=0.1)[0]),
        dtype=at_least_float32,
    ),
    "cp_sequence_sums": Row("cp_sequence_sums", over_tokens(fstep.cp_sequence_sums), dtype=at_least_float32),
    "cp_sequence_last": Row("cp_sequence_last", over_tokens(fstep.cp_sequence_last)),
    "distill_loss": Row("distill_loss", distill(False), dtype=at_least_float32),
    "distill_loss, js": Row("distill_loss", distill(False, divergence="js", beta=0.3), dtype=at_least_float32),
    "topk_distill_loss": Row("topk_distill_loss", distill(True), dtype=at_least_float32),
    "topk_distill_loss, reverse": Row("topk_distill_loss", distill(True, divergence="reverse"), dtype=at_least_float32),
    # grad
    "value_and_grad": Row(
        "value_and_grad", lambda d: (lambda p, x: fstep.value_and_grad(quadratic)(p, x)[1], *at_1_2(d)), like=0
    ),
    "vjp": Row(
        "vjp",
        lambda d: (
            lambda p, x, c: fstep.vjp(lambda p: torch.tanh(p["w"] @ x), p)[1](c)[0],
            *at_1_2(d),
            randn(3, 3, dtype=d),
        ),
        like=0,
    ),
    "lift": Row("lift", module_of),
    "remat": Row("remat", lambda d: (fstep.remat(quadratic), *at_1_2(d))),
    "split_weights": Row(
        "split_weights",
        lambda d: (
            fstep.split_weights(lambda p, x: torch.tanh(fstep.linear(x, p["w"]))),
            {"w": randn(1, 3, 3, dtype=d)},
            randn(2, 4, 3, dtype=d),
        ),
    ),
    "pp_forward_backward": Row(
        "pp_forward_backward Tied",
        lambda d: (
            lambda p: fstep.pp_forward_backward(stage, loss, p, microbatches(d), trainable=not_ids)[1],
            params(d),
        ),
    ),
    "pp_forward": Row(
        "pp_forward",
        lambda d: (lambda p: fstep.pp_forward(stage, lambda p, x, mb: x * 2, p, microbatches(d)), params(d)),
        no_slope="takes no gradients",
    ),
    # loss, of policies
    "clipped_loss": Row(
        "clipped_loss",
        lambda d: (
            lambda x, w: fstep.clipped_loss(x, torch.tensor([1.0, -1, 1, -1], dtype=d), w, dual=1.5)[0],
            torch.tensor([0.1, -0.05, 0.5, 0.75], dtype=d),
            torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=d),
        ),
        dtype=at_least_float32,
    ),
    "cispo_loss": Row(
        "cispo_loss",
        lambda d: (
            lambda p, w: fstep.cispo_loss(p, torch.tensor([0.5, -0.5], dtype=d), torch.ones(2, dtype=d), w)[0],
            -randn(1, 2, dtype=d).abs(),
            randn(2, 2, dtype=d).abs(),
        ),
        dtype=at_least_float32,
    ),
    "reinforce_loss": Row(
        "reinforce_loss",
        lambda d: (
            lambda p, w: fstep.reinforce_loss(p, torch.tensor([2.0, -1.0], dtype=d), w),
            randn(1, 2, dtype=d),
            randn(2, 2, dtype=d),
        ),
        dtype=at_least_float32,
    ),
    "kl_loss": Row(
        "kl_loss",
        lambda d: (
            lambda p, r, w: fstep.kl_loss(p, torch.tensor([0.5, -0.5], dtype=d), w, log_ratio=r),
            randn(1, 2, dtype=d),
            randn(2, 2, dtype=d),
            randn(3, 2, dtype=d),
        ),
        dtype=at_least_float32,
    ),
    "weigh": Row(
        "weigh",
        lambda d: (lambda x, w, c: fstep.weigh(x, w, counts=c), *(randn(i, 3, dtype=d) for i in range(3))),
        dtype=at_least_float32,
    ),
    "value_loss": Row(
        "value_loss",
        lambda d: (
            lambda v, w: fstep.value_loss(v, torch.ones(3, dtype=d), w, old_values=torch.zeros(3, dtype=d), clip=0.5)[0],
            torch.tensor([0.25, 0.75, -2.0], dtype=d),
            torch.tensor([1.0, 2.0, 3.0], dtype=d),
        ),
        dtype=at_least_float32,
    ),
    "gae": Row(
        "gae",
        lambda d: (
            lambda r, v, b: fstep.gae(r, v, docs(d), gamma=0.75, lam=0.5, bootstrap=b),
            randn(1, 11, dtype=d),
            randn(2, 11, dtype=d),
            randn(3, 4, dtype=d),
        ),
        dtype=at_least_float32,
    ),
    "group_advantages": Row(
        "group_advantages",
        lambda d: (lambda r: fstep.group_advantages(r, torch.tensor([3, 1, 3, 1, 3])), randn(1, 5, dtype=d)),
        dtype=at_least_float32,
    ),
    "whiten": Row(
        "whiten", lambda d: (fstep.whiten, randn(1, 4, dtype=d), randn(2, 4, dtype=d).abs()), dtype=at_least_float32
    ),
    "document_weights": Row("document_weights", lambda d: (fstep.document_weights, docs(d)), dtype=at_least_float32),
    "spread_documents": Row(
        "spread_documents", lambda d: (lambda x: fstep.spread_documents(x, docs(d), last=True), randn(1, 4, dtype=d))
    ),
    "cp_sequence_log_ratio": Row(
        "cp_sequence_log_ratio",
        lambda d: (fstep.cp_sequence_log_ratio, randn(1, 12, dtype=d), microbatches(d)[0]),
        dtype=at_least_float32,
    ),
    "importance_weights": Row(
        "importance_weights ratio_extremes",
        lambda d: (
            lambda x, w: (fstep.importance_weights(x, w), fstep.ratio_extremes(x, w)),
            randn(1, 4, dtype=d),
            randn(2, 4, dtype=d),
        ),
        dtype=at_least_float32,
        no_slope="constants",
    ),
    # update, state
    "finalize_grads": Row(
        "finalize_grads",
        lambda d: (
            lambda g, r: fstep.finalize_grads(g, r, mesh=fstep.Mesh(), max_norm=0.5)[0],
            {"a": randn(1, 3, dtype=d), "b": {"frozen": None, "c": randn(2, 2, 2, dtype=d)}},
            Ratio(torch.tensor(3.0, dtype=d), torch.tensor(2.0, dtype=d)),
        ),
        like=0,
    ),
    "init_state": Row("init_state TrainState", lambda d: (first_state, params(d))),
    "sgd": Row("sgd SGD SGDState", optimizer(fstep.SGD(momentum=0.9, nesterov=True, weight_decay=0.1)), like=0),
    "adamw": Row("adamw AdamW AdamWState", optimizer(fstep.AdamW(weight_decay=0.1)), like=0),
    "muon": Row("muon Muon MuonState", optimizer(fstep.Muon(weight_decay=0.1)), like=0),
    "constant": step("constant"),
    "warmup_cosine": step("warmup_cosine", warmup=3, total=9),
    "warmup_linear": step("warmup_linear", warmup=6, total=9),
    "wsd": step("wsd", warmup=3, total=9, decay=5),
}

EXEMPT = {
    "DonatedError CheckpointError WeightsError": "exceptions",
    "HFTensor save_checkpoint load_checkpoint latest_step save_hf load_hf stream_hf": "read and write files",
    "Axis Mesh MeshError require_single mesh_from_env simulate": "about ranks",
    "Shard Copied Stages Place places bare cut_like": "say where a parameter lives",
    "tp_embed tp_gather tp_head_logits tp_local tp_row_linear tp_scatter tp_token_logprobs"
    " tp_distill_loss tp_topk_distill_loss tp_token_logprob_sum tp_token_top_logprobs": "communicate on an axis",
    "token_top_logprobs": "has no gradient",
    "generate": "runs a model that it is given, without gradients",
    "psum pmax pvary as_partial all_gather reduce_scatter all_to_all ppermute broadcast take_shard":
        "communicate on an axis",
    "Pieces shard_params gather_params scatter_grads unshard_params fold_layers": "communicate on an axis",
    "cp_shard cp_unshard cp_gather_logprobs cp_attention divide_documents gather_documents": "take an axis",
    "Schedule Action Span ScheduleStats gpipe one_f_one_b interleaved interleaved_zero_bubble zbv dualpipev stage_ranks":
        "tables of actions, without tensors",
    "pytree static": "declare a class",
    "in_transform is_recording": "say what is going on around a call",
    "matrices hidden_matrices": "answer yes or no about a path and a shape",
}  # fmt: skip


def is_variable(x: Any, dtype: torch.dtype) -> bool:
    return isinstance(x, Tensor) and x.dtype == dtype


def variables(args: Any, dtype: torch.dtype) -> list[Tensor]:
    return [x for x in tree_leaves(args) if is_variable(x, dtype)]


def put(args: Any, new: Any, dtype: torch.dtype) -> Any:
    fresh: Iterator[Tensor] = iter(new)
    return tree_map(lambda x: next(fresh) if is_variable(x, dtype) else x, args)


def floats(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def objective(f: Callable[..., Any], args: Any) -> Callable[..., Tensor]:
    """Return a scalar function of the variables: what comes out, weighted by fixed numbers."""

    def total(*leaves: Tensor) -> Tensor:
        out = floats(f(*put(args, leaves, torch.float64)))
        parts = [(x * randn(100 + i, *x.shape, dtype=x.dtype)).sum().double() for i, x in enumerate(out)]
        return sum(parts, 0 * leaves[0].sum())

    return total


@pytest.fixture(autouse=True)
def exact_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its iteration runs in bfloat16, where a batched product may be another kernel than a single one.
    monkeypatch.setattr("fstep.update.muon.NEWTON_SCHULZ_DTYPE", torch.float64)


every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
with_variables = pytest.mark.parametrize(
    "row", [pytest.param(r, id=name) for name, r in ROWS.items() if variables(r.make(torch.float64)[1:], torch.float64)]
)


@every_row
@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recorded"])
def test_pure(row: Row, recording: bool) -> None:
    f, *args = row.make(torch.float64)
    args = put(args, [x.clone().requires_grad_(recording) for x in variables(args, torch.float64)], torch.float64)
    first = fstep.testing.assert_pure(f, *args)
    fstep.testing.assert_trees_close(f(*args), first, rtol=0)  # and the same arguments give the same result


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype(row: Row, dtype: torch.dtype) -> None:
    f, *args = row.make(dtype)
    assert {x.dtype for x in floats(f(*args))} <= {row.dtype(dtype)}


@pytest.mark.parametrize("row", [pytest.param(r, id=name) for name, r in ROWS.items() if r.like is not None])
def test_structure(row: Row) -> None:
    f, *args = row.make(torch.float64)
    out, like = f(*args), args[row.like or 0]
    assert tree_paths(out) == tree_paths(like) and type(out) is type(like)
    assert tree_map(lambda x: getattr(x, "shape", None), out) == tree_map(lambda x: getattr(x, "shape", None), like)


@with_variables
def test_slope(row: Row) -> None:
    if row.no_slope:
        pytest.skip(row.no_slope)
    f, *args = row.make(torch.float64)
    total, at = objective(f, args), variables(args, torch.float64)
    # A direction that keeps zeros where they are: a weight of 0 drops its token, which is no smooth thing to do.
    direction = [randn(200 + i, *x.shape, dtype=x.dtype) * (x != 0) for i, x in enumerate(at)]
    h = 1e-6
    above, below = (total(*(x + s * h * v for x, v in zip(at, direction, strict=True))) for s in (1, -1))
    leaves = [x.clone().requires_grad_() for x in at]
    grads = torch.autograd.grad(total(*leaves), leaves, allow_unused=True, materialize_grads=True)
    slope = sum(float((g * v).sum()) for g, v in zip(grads, direction, strict=True))
    assert slope == pytest.approx(float(above - below) / (2 * h), rel=1e-6, abs=1e-8)


@with_variables
def test_grad(row: Row) -> None:
    f, *args = row.make(torch.float64)
    total, at = objective(f, args), variables(args, torch.float64)
    leaves = [x.clone().requires_grad_() for x in at]
    expected = list(torch.autograd.grad(total(*leaves), leaves, allow_unused=True, materialize_grads=True))
    found = torch.func.grad(total, argnums=tuple(range(len(at))))(*at)
    fstep.testing.assert_trees_close(list(found), expected, rtol=1e-10, atol=1e-14)


@with_variables
def test_vmap(row: Row) -> None:
    if row.no_vmap:
        pytest.skip(row.no_vmap)
    f, *args = row.make(torch.float64)
    at = variables(args, torch.float64)

    def run(*leaves: Tensor) -> list[Tensor]:
        return [x for x in tree_leaves(f(*put(args, leaves, torch.float64))) if isinstance(x, Tensor)]

    factors = (1.0, 1.25, 0.75)
    found = torch.func.vmap(run)(*(torch.stack([x * c for c in factors]) for x in at))
    for i, c in enumerate(factors):
        fstep.testing.assert_trees_close([x[i] for x in found], run(*(x * c for x in at)), rtol=1e-10, atol=1e-14)


def test_every_public_name_is_in_the_table_or_exempt() -> None:
    rows = {name for row in ROWS.values() for name in row.names.split()}
    exempt = {name for names in EXEMPT for name in names.split()}
    assert not rows & exempt, sorted(rows & exempt)
    assert rows | exempt == set(fstep.__all__), (
        f"not in ROWS and not in EXEMPT: {sorted(set(fstep.__all__) - rows - exempt)}; "
        f"no public name: {sorted((rows | exempt) - set(fstep.__all__))}"
    )


# The laws themselves see what they are for ----------------------------------------------------------------------------


def bad_row(f: Callable[..., Any], like: int | None = None) -> Row:
    return Row("", lambda d: (f, randn(1, 3, dtype=d)), like=like)


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]  # a factor of 2 is missing


@pytest.mark.parametrize(
    ("law", "f"),
    [
        (lambda row: test_pure(row, False), lambda x: x.mul_(1)),
        (lambda row: test_pure(row, False), lambda x: x + torch.rand(3)),
        (lambda row: test_dtype(row, torch.bfloat16), lambda x: x.float()),
        (lambda row: test_dtype(row, torch.float64), lambda x: x.float()),
        (test_structure, lambda x: x[:2]),
        (test_structure, lambda x: [x]),
        (test_slope, _Wrong.apply),
        (test_grad, lambda x: x**2 if fstep.in_transform() else x**3),
        (test_vmap, lambda x: x * 2 if fstep.in_transform() else x),
        (test_vmap, lambda x: x * float(x[0])),
    ],
)
def test_law_sees(law: Callable[[Row], None], f: Callable[..., Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        law(bad_row(f, like=0))
