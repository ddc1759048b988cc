"""What docs/torch-func.md shows, as tests: per-document gradients, Hessian-vector products, gradients through training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fstep
from fstep.tree import tree_leaves, tree_map
from fstep_models.dense import Config, Dense

VOCAB = 11
CONFIG = Config(
    family="qwen3", vocab=VOCAB, dim=8, ffn=12, layers=2, heads=2, kv_heads=1, head_dim=4,
    rope=fstep.Rope(theta=1e4, dim=4), windows=(0, 3), tied=True, qk_norm=True,
)  # fmt: skip
MODEL = Dense(CONFIG, attention="math")
LENGTHS = [4, 6, 2, 5]


def params() -> Any:
    p = MODEL.init(fstep.Key.seed(0), dtype=torch.float64)
    return tree_map(lambda x: x + 0.2 * torch.randn_like(x), p)


def documents(seed: int = 0) -> fstep.Docs:
    g = torch.Generator().manual_seed(seed)
    return fstep.make_docs(
        [torch.randint(0, VOCAB, (n,), generator=g) for n in LENGTHS],
        weights=[torch.rand(n, generator=g, dtype=torch.float64) + 0.5 for n in LENGTHS],
    )


def row(docs: fstep.Docs, **options: Any) -> fstep.Packed:
    return fstep.pack_thd(docs, **options)


def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
    return fstep.sft_loss(MODEL.logprobs(p, x, mb), mb.weights)


def loss(p: Any, mb: fstep.Packed) -> Tensor:
    return loss_fn(p, MODEL.stage()(p, None, mb), mb).num


def close(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Per-document gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["math", "auto"])
def test_per_document_gradients(attention: str) -> None:
    """One vmapped call beside one ordinary call a document; and they add up to the batch's gradient."""
    model, p, docs = dataclasses.replace(MODEL, attention=attention), params(), documents()

    def one(p: Any, mb: fstep.Packed) -> Tensor:
        return fstep.sft_loss(model.logprobs(p, model.stage()(p, None, mb), mb), mb.weights).num

    rows = [row(fstep.select_documents(docs, [i]), length=8) for i in range(len(LENGTHS))]
    stacked = tree_map(lambda *xs: torch.stack(xs), *rows)
    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(p, stacked)
    mine = torch.func.vmap(lambda p, mb: fstep.value_and_grad(one)(p, mb)[1], in_dims=(None, 0))(p, stacked)
    for i in range(len(LENGTHS)):
        _, expected = fstep.value_and_grad(loss)(p, row(fstep.select_documents(docs, [i])))
        for got in (each, mine):
            close(tree_map(lambda g, i=i: g[i], got), expected)
    _, whole = fstep.pp_forward_backward(model.stage(), loss_fn, p, [row(docs)])
    close(tree_map(lambda g: g.sum(0), each), whole)


@pytest.mark.parametrize("tie", [False, True])
def test_per_document_gradients_of_a_lifted_model(tie: bool) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tie, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).double().eval()
    p, apply = fstep.lift(module)
    ids = torch.randint(0, VOCAB, (3, 6))

    def one(p: Any, ids: Tensor) -> Tensor:
        logp = apply(p, input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return -logp.gather(-1, ids[1:, None]).sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(p, ids)
    for i in range(3):
        module.zero_grad()
        logits = module(input_ids=ids[i : i + 1]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[i, 1:], reduction="sum").backward()
        for name, q in module.named_parameters():
            torch.testing.assert_close(each[name][i], q.grad, rtol=1e-6, atol=1e-7)  # float32 inside its norms


# Hessian-vector products ---------------------------------------------------------------------------------------------


def hvp(take: Callable, p: Any, v: Any, mb: fstep.Packed) -> Any:
    def slope(p: Any) -> Tensor:
        return sum((g * d).sum() for g, d in zip(tree_leaves(take(p, mb)), tree_leaves(v), strict=True))

    return fstep.value_and_grad(slope)(p)[1]


# Forward mode makes torch load decompositions of its own through the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_hessian_vector_product() -> None:
    """Four ways of writing it, beside central differences of the gradient. The head is tied to the embedding."""
    p, mb = params(), row(documents())
    v = tree_map(torch.randn_like, p)
    step = 1e-5

    def grad(p: Any) -> Any:
        return fstep.value_and_grad(loss)(p, mb)[1]

    up, down = (grad(tree_map(lambda x, d, s=s: x + s * step * d, p, v)) for s in (1, -1))
    expected = tree_map(lambda a, b: (a - b) / (2 * step), up, down)
    scale = max(float(x.abs().max()) for x in tree_leaves(expected))
    twice = hvp(lambda p, mb: fstep.value_and_grad(loss)(p, mb)[1], p, v, mb)
    _, pull = fstep.vjp(grad, p)
    _, forward = torch.func.jvp(grad, (p,), (v,))
    func = torch.func.vjp(lambda p: torch.func.grad(loss)(p, mb), p)[1](v)[0]
    for got in (twice, pull(v)[0], forward, func):
        close(got, func)
        close(got, expected, 1e-7 * scale)


def test_hessian_vector_product_through_pp_forward_backward() -> None:
    p, docs = params(), documents()
    v = tree_map(torch.randn_like, p)
    parts = [row(part) for part in fstep.split_microbatches(docs, num=2)]
    expected = hvp(lambda p, mb: fstep.value_and_grad(loss)(p, mb)[1], p, v, row(docs))
    got = hvp(lambda p, mb: fstep.pp_forward_backward(MODEL.stage(), loss_fn, p, mb)[1], p, v, parts)
    close(got, expected, 1e-10)


# Gradients through training ------------------------------------------------------------------------------------------

OPTIMIZERS = {"adamw": fstep.AdamW(eps=1e-3, weight_decay=0.1), "momentum": fstep.SGD(momentum=0.9)}


def after_two_steps(opt: Any, p: Any, lr: Tensor, document_weights: Tensor) -> Tensor:
    """Train for two steps on documents weighted as given, and return the validation loss."""
    state = fstep.init_state(p, opt)
    for seed in (1, 2):
        docs = documents(seed)
        docs = dataclasses.replace(docs, weights=docs.weights * document_weights.repeat_interleave(docs.lengths))
        batch = [row(part) for part in fstep.split_microbatches(docs, num=2)]
        loss, grads = fstep.pp_forward_backward(MODEL.stage(), loss_fn, state.params, batch)
        grads, _ = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=1.0)
        state = opt.update(state, grads, lr=lr)
    held_out = row(documents(3))
    return loss_fn(state.params, MODEL.stage()(state.params, None, held_out), held_out).mean()


@pytest.mark.parametrize("mode", ["fstep", "torch.func"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_through_two_training_steps(name: str, mode: str) -> None:
    """By the learning rate, the documents' weights and the params, beside central differences in float64."""
    arguments = params(), torch.tensor(0.02, dtype=torch.float64), torch.linspace(0.5, 2.0, 4, dtype=torch.float64)

    def f(*args: Any) -> Tensor:
        return after_two_steps(OPTIMIZERS[name], *args)

    if mode == "fstep":
        value, derivatives = fstep.value_and_grad(f, (0, 1, 2))(*arguments)
    else:
        derivatives, value = torch.func.grad_and_value(f, (0, 1, 2))(*arguments)
    torch.testing.assert_close(value, f(*arguments), rtol=1e-12, atol=1e-12)
    step = 1e-6
    for i, derivative in enumerate(derivatives):
        direction = tree_map(torch.randn_like, arguments[i])
        up, down = (
            [tree_map(lambda x, d, s=s: x + s * step * d, a, direction) if j == i else a for j, a in enumerate(arguments)]
            for s in (1, -1)
        )
        slope = (f(*up) - f(*down)) / (2 * step)
        dot = sum((g * d).sum() for g, d in zip(tree_leaves(derivative), tree_leaves(direction), strict=True))
        assert slope.abs() > 1e-5
        torch.testing.assert_close(dot, slope, rtol=1e-6, atol=1e-9)


def test_weights_that_are_all_doubled_change_nothing() -> None:
    """The mean divides by them: an Euler identity that a gradient lost in the denominator breaks."""
    weights = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    lr = torch.tensor(0.02, dtype=torch.float64)
    _, grad = fstep.value_and_grad(lambda w: after_two_steps(OPTIMIZERS["adamw"], params(), lr, w))(weights)
    assert grad.abs().max() > 1e-4
    assert (grad @ weights).abs() < 1e-10
