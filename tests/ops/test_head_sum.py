"""token_logprob_sum beside log_softmax of the whole [tokens, vocab] matrix in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep.ops import head
from tests.ops.test_head import DIM, TOKENS, VOCAB, Sizes, close
from tests.ops.test_head import inputs as three

F64 = torch.float64


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    logp = ((hidden @ weight.T) / temperature).log_softmax(-1)
    kept = (labels != -100) & (weights != 0)
    chosen = logp[torch.arange(len(labels)), labels.clamp(min=0)]
    return chosen[kept] @ weights[kept].to(chosen.dtype)


def inputs(dtype: torch.dtype = F64, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels that are left out, and weights of 0, below 0 and above 1."""
    weights = torch.randn(tokens, dtype=F64) * 3
    weights[1::3] = 0
    return *three(dtype, tokens), weights.to(torch.promote_types(dtype, torch.float32))


@pytest.fixture(params=[1024, 2, 1], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One chunk; two groups of three, the last one shorter; four groups, likewise."""
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    return request.param


def grads_of(f: Callable[..., Tensor], given: tuple[Tensor, ...], argnums: Any = (0, 1, 3), **options: Any) -> Any:
    return fstep.value_and_grad(f, argnums)(*given, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.3, 0.0])
def test_equals_log_softmax(factor: float, temperature: float, chunk: int) -> None:
    given = inputs()
    got = grads_of(lambda *x: fstep.token_logprob_sum(*x, temperature=temperature) * factor, given)
    want = grads_of(lambda *x: oracle(*x, temperature) * factor, given)
    assert factor == 0 or all(g.abs().max() > 0.1 for g in want[1])
    close(got, want)


@pytest.mark.parametrize("argnums", [0, 1, 3, (0, 3), (0, 1)])
def test_frozen_parts(argnums: Any, chunk: int) -> None:
    given = inputs()
    close(grads_of(fstep.token_logprob_sum, given, argnums), grads_of(oracle, given, argnums))


@pytest.mark.parametrize(("argnums", "products"), [((0, 1), 3), (0, 2), (1, 2), (3, 1)])
def test_computes_only_the_gradients_that_are_wanted(argnums: Any, products: int) -> None:
    given = inputs()
    with Sizes() as sizes:
        grads_of(fstep.token_logprob_sum, given, argnums)
    assert sizes.products == products
    with Sizes() as sizes:
        fstep.token_logprob_sum(*given)
    assert sizes.products == 1
    with torch.no_grad(), Sizes() as sizes:
        fstep.token_logprob_sum(given[0].requires_grad_(), *given[1:])
    assert sizes.products == 1


@pytest.mark.parametrize("empty", ["labels", "weights"])
def test_nothing_to_learn(empty: str, chunk: int) -> None:
    hidden, weight, labels, weights = inputs()
    labels = torch.full_like(labels, -100) if empty == "labels" else labels
    weights = torch.zeros_like(weights) if empty == "weights" else weights
    value, grads = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights))
    assert value == 0 and not any(g.any() for g in grads)


def test_dropped_tokens_leave_nothing_behind(chunk: int) -> None:
    hidden, weight, labels, weights = inputs()
    dropped = (labels == -100) | (weights == 0)
    assert dropped.any() and not dropped.all()
    _, (d_hidden, d_weight, d_weights) = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights))
    assert torch.equal(d_hidden.any(1), ~dropped) and torch.equal(d_weights != 0, ~dropped)
    kept = (hidden[~dropped], weight, labels[~dropped], weights[~dropped])
    close(d_weight, grads_of(fstep.token_logprob_sum, kept)[1][1])


def test_an_impossible_token_of_weight_0_does_no_harm(chunk: int) -> None:
    """Its log probability is -inf, and 0 times that would be NaN."""
    hidden = torch.ones(4, 1, dtype=F64)
    weight = torch.tensor([0.0, -torch.inf, 1.0], dtype=F64)[:, None]
    labels, weights = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.0, 0.0, 2.0])
    value, (d_weight, d_weights) = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights), (1, 3))
    p = torch.tensor([1.0, 0.0, torch.e], dtype=F64) / (1 + torch.e)
    assert value.item() == pytest.approx(p[0].log().item() + 2 * p[2].log().item())
    close(d_weight, (torch.tensor([1.0, 0.0, 2.0], dtype=F64) - 3 * p)[:, None])
    assert d_weights.isfinite().all() and d_weights[0] == pytest.approx(p[0].log().item())
    assert fstep.token_logprob_sum(hidden, weight, labels, weights + 1) == -torch.inf


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch, of its own tracing
@pytest.mark.parametrize("how", ["plain", "entropy", "transform", "twice", "compiled"])
@pytest.mark.parametrize("function", ["sum", "each"])
def test_a_dropped_token_may_be_anything(function: str, how: str, chunk: int) -> None:
    """Logits of NaN, where nothing is asked for: 0 times them would be NaN, in the gradient of the weight as well."""
    hidden, weight, labels, weights = inputs()
    hidden[4], labels[4] = torch.inf, -100
    if how in ("plain", "twice", "compiled") and function == "sum":
        hidden[2], weights[2] = torch.nan, 0.0
    dropped = (labels == -100) | (weights == 0)

    def f(h: Tensor, w: Tensor, labels: Tensor = labels, weights: Tensor = weights) -> Tensor:
        if function == "sum":
            return fstep.token_logprob_sum(h, w, labels, weights)
        if how == "entropy":
            logp, entropy = fstep.token_logprobs(h, w, labels, entropy=True)
            return (torch.where(weights != 0, logp + entropy, 0) * weights).sum()
        return (fstep.token_logprobs(h, w, labels) * weights).sum()

    def grads(h: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if how == "transform":
            return torch.func.grad(lambda h, w: f(h, w, *rest), (0, 1))(h, w)
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        run = torch.compile(f, backend="aot_eager") if how == "compiled" else f
        return torch.autograd.grad(run(*leaves, *rest), leaves, create_graph=how == "twice")

    found, kept = grads(hidden, weight), grads(hidden[~dropped], weight, labels[~dropped], weights[~dropped])
    close(found[0][~dropped], kept[0])
    close(found[1], kept[1])
    assert not found[0][dropped].any() and found[0][~dropped].any()
    torch._dynamo.reset()


# The gradient is found once and handed out ------------------------------------------------------------------------------


def test_pulled_back_twice(chunk: int) -> None:
    """Whoever got a gradient may add to it; a second pass gets its own."""
    hidden, weight, labels, weights = inputs()
    want = grads_of(oracle, (hidden, weight, labels, weights))[1]
    _, pull = fstep.vjp(lambda h, w, s: fstep.token_logprob_sum(h, w, labels, s), hidden, weight, weights)
    for factor in (1.0, -1.0, 0.5):
        got = pull(torch.tensor(factor, dtype=F64))
        close(got, tuple(g * factor for g in want))
        for g in got:
            g.add_(100)


def test_two_uses_in_one_loss(chunk: int) -> None:
    given, other = inputs(), inputs()

    def two(f: Any) -> Any:
        return lambda h, w, y, s: 2 * f(h, w, y, s) - f(other[0], w, other[2], s).square()

    close(grads_of(two(fstep.token_logprob_sum), given), grads_of(two(oracle), given))


def test_inputs_are_not_changed() -> None:
    given = inputs()
    before = [x.clone() for x in given]
    grads_of(fstep.token_logprob_sum, given)
    assert all(torch.equal(x, old) for x, old in zip(given, before, strict=True))


def test_a_batch_of_one_microbatch_and_of_many() -> None:
    """As a step uses it: sums of microbatches add up to that of the batch."""
    hidden, weight, labels, weights = inputs()
    whole = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights), 1)
    parts = [
        grads_of(fstep.token_logprob_sum, (hidden[at], weight, labels[at], weights[at]), 1)
        for at in (slice(0, 5), slice(5, 5), slice(5, 11))
    ]
    close(sum(v for v, _ in parts), whole[0])
    close(sum(g for _, g in parts), whole[1])


# Memory and dtypes -------------------------------------------------------------------------------------------------------


def test_never_holds_tokens_times_vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # 128 tokens a chunk
    tokens, vocab = 1000, 300
    hidden, weight, labels = torch.randn(tokens, 4), torch.randn(vocab, 4), torch.randint(0, vocab, (tokens,))
    with Sizes() as sizes:
        grads_of(fstep.token_logprob_sum, (hidden, weight, labels, torch.ones(tokens)))
    assert sizes.largest == head.HELD * 128 * vocab
    with torch.no_grad(), Sizes() as sizes:
        fstep.token_logprob_sum(hidden, weight, labels, torch.ones(tokens))
    assert sizes.largest == 128 * vocab


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, labels, weights = inputs(dtype)
    value, grads = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights))
    assert value.dtype == torch.float32 and [g.dtype for g in grads] == [dtype, dtype, torch.float32]
    want, exact = grads_of(oracle, (hidden.double(), weight.double(), labels, weights.double()))
    eps = torch.finfo(dtype).eps
    assert (value - want).abs() < 4 * eps * want.abs()
    for got, g in zip(grads, exact, strict=True):
        assert (got.double() - g).norm() < 4 * eps * g.norm()


@pytest.mark.parametrize("function", ["sum", "each"])
def test_a_weight_of_a_wider_dtype(function: str, chunk: int) -> None:
    """Rounded for the products; its gradient arrives in its own dtype, without the rounding of a cast outside."""
    hidden, weight, labels, weights = inputs(torch.float32)
    hidden = hidden.bfloat16()

    def f(h: Tensor, w: Tensor) -> Tensor:
        if function == "sum":
            return fstep.token_logprob_sum(h, w, labels, weights)
        return (fstep.token_logprobs(h, w, labels) * weights).sum()

    value, (d_hidden, d_weight) = fstep.value_and_grad(f, (0, 1))(hidden, weight)
    assert d_hidden.dtype == torch.bfloat16 and d_weight.dtype == torch.float32
    outside, (same, near) = fstep.value_and_grad(lambda h, w: f(h, w.bfloat16()), (0, 1))(hidden, weight)
    assert value == outside and torch.equal(d_hidden, same)
    assert 0 < (d_weight - near).norm() <= torch.finfo(torch.bfloat16).eps * near.norm()
    assert torch.equal(d_weight.bfloat16(), near)
    again = fstep.value_and_grad(lambda w: fstep.value_and_grad(f, 1)(hidden, w)[1].square().sum())(weight)[1]
    assert again.dtype == torch.float32 and again.isfinite().all()


def test_the_weight_gradient_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: 1)
    monkeypatch.setattr(head, "HELD", 1)
    hidden, weight = torch.rand(800, DIM).bfloat16(), torch.randn(VOCAB, DIM).bfloat16()
    labels, weights = torch.zeros(800, dtype=torch.int64), torch.ones(800)
    _, got = grads_of(fstep.token_logprob_sum, (hidden, weight, labels, weights), 1)
    _, exact = grads_of(oracle, (hidden.double(), weight.double(), labels, weights), 1)
    assert (got.double() - exact).norm() < torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, chunk: int) -> None:
    given = (torch.ones(tokens, 3), torch.ones(4, 3), torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens))
    value, grads = grads_of(fstep.token_logprob_sum, given)
    assert value == pytest.approx(-tokens * torch.tensor(4.0).log().item()) and grads[1].any() == bool(tokens)


# Around other derivatives -----------------------------------------------------------------------------------------------


def test_differentiated_twice() -> None:
    hidden, weight, labels, weights = inputs(tokens=4)
    weights[weights == 0] = 2.0  # at 0 a token is dropped, and nothing is differentiable
    for x in (hidden, weight, weights):
        x.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda h, w, s: fstep.token_logprob_sum(h, w, labels, s, temperature=0.7), (hidden, weight, weights)
    )


@pytest.mark.parametrize("argnum", [0, 1, 3])
def test_differentiated_twice_with_one_wanted(argnum: int) -> None:
    given = inputs(tokens=5)

    def norm(f: Any) -> Any:
        return lambda *x: fstep.value_and_grad(f, argnum)(*x)[1].square().sum()

    close(grads_of(norm(fstep.token_logprob_sum), given, (0, 1)), grads_of(norm(oracle), given, (0, 1)))


def test_a_tied_head_is_differentiated_twice() -> None:
    _, weight, labels, weights = inputs()

    def norm(f: Any) -> Any:
        def loss(weight: Tensor) -> Tensor:
            return f(torch.tanh(weight[:TOKENS]), weight, labels, weights)

        return lambda weight: fstep.value_and_grad(loss)(weight)[1].square().sum()

    close(fstep.value_and_grad(norm(fstep.token_logprob_sum))(weight), fstep.value_and_grad(norm(oracle))(weight))


# Forward mode makes torch load decompositions of its own through the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_under_torch_func() -> None:
    hidden, weight, labels, weights = inputs(tokens=6)
    kept = (labels != -100) & (weights != 0)

    def mine(h: Tensor, w: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return fstep.token_logprob_sum(h, w, y, s, temperature=0.7)

    def theirs(h: Tensor, w: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logp = ((h @ w.T) / 0.7).log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]
        return (torch.where((y != -100) & (s != 0), logp, 0) * s).sum()

    assert kept.any()
    parts = hidden.reshape(3, 2, DIM), labels.reshape(3, 2), weights.reshape(3, 2)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 3))(hidden, weight, labels, weights),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), in_dims=(0, None, 0, 0))(parts[0], weight, parts[1], parts[2]),
        lambda f: torch.func.hessian(f)(hidden, weight, labels, weights),
    ):
        close(transform(mine), transform(theirs), 1e-10)


# torch's tracer does it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    given = inputs()

    def f(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return -fstep.token_logprob_sum(hidden.tanh(), weight, labels, weights)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    close(grads_of(compiled, given), grads_of(f, given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.tensor([0, 13])), ValueError, "label 13 at place 1 is not in the vocabulary of 13"),
        (dict(weights=torch.ones(3)), ValueError, r"hidden \(2, 5\) and weights \(3,\) do not fit"),
        (dict(weights=torch.ones(2, 1)), ValueError, r"and weights \(2, 1\) do not fit; they are \[tokens, dim\] and"),
        (dict(weights=1.0), TypeError, "weights is a float; pass a tensor"),
        (dict(labels=torch.tensor([0])), ValueError, r"hidden \(2, 5\) and labels \(1,\) do not fit"),
        (dict(hidden=torch.zeros(2, 4)), ValueError, r"hidden is torch.float32 \(2, 4\) and weight"),
        (dict(weight=torch.zeros(13, 5).bfloat16()), ValueError, "of one dtype, or the weight of a wider one"),
        (dict(temperature=0.0), ValueError, "temperature is 0.0; pass a positive number"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = dict(
        hidden=torch.zeros(2, 5), weight=torch.zeros(13, 5), labels=torch.tensor([0, 1]), weights=torch.ones(2)
    )
    with pytest.raises(error, match=f"token_logprob_sum: .*{message}"):
        fstep.token_logprob_sum(**given | change)


# What token_logprobs does with many blocks of tokens and of the vocabulary ------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [4, 16384])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_token_logprobs_block_by_block(
    dtype: torch.dtype, tokens_at_once: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TOKENS", tokens_at_once)
    hidden, weight, labels, weights = inputs(dtype)

    def mine(h: Tensor, w: Tensor) -> Tensor:
        logp, entropy = fstep.token_logprobs(h, w, labels, temperature=0.7, entropy=True)
        return (weights * (logp + 0.3 * entropy)).sum()

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        logp = ((h @ w.T) / 0.7).log_softmax(-1)
        chosen = logp[torch.arange(TOKENS), labels.clamp(min=0)]
        return (weights * (chosen - 0.3 * (logp.exp() * logp).sum(-1)) * (labels != -100)).sum()

    got = fstep.value_and_grad(mine, (0, 1))(hidden, weight)
    want = fstep.value_and_grad(theirs, (0, 1))(hidden.double(), weight.double())
    if dtype == F64:
        close(got, want)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


def test_a_place_without_a_label_may_have_any_weight() -> None:
    """The advantage of a prompt token may be NaN; values and gradients are those without the token."""
    hidden, head, labels = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(5, 4, dtype=torch.float64),
        torch.tensor([1, -100, 2]),
    )
    weights = torch.tensor([1.0, torch.nan, 2.0], dtype=torch.float64)
    f = lambda h, w, at: fstep.token_logprob_sum(h, w, labels[at], weights[at])  # noqa: E731
    some = torch.tensor([0, 2])
    value, (dh, dw) = fstep.value_and_grad(lambda h, w: f(h, w, slice(None)), (0, 1))(hidden, head)
    want, (eh, ew) = fstep.value_and_grad(lambda h, w: f(h[some], w, some), (0, 1))(hidden, head)
    assert torch.equal(value, want) and torch.equal(dh, eh)
    torch.testing.assert_close(dw, ew, rtol=1e-13, atol=1e-13)
