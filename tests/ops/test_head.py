"""token_logprobs beside log_softmax of the whole [tokens, vocab] matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fstep.grad.autodiff import value_and_grad
from fstep.ops import head
from fstep.ops.head import head_logits, token_logprobs
from fstep.tree import tree_leaves

TOKENS, DIM, VOCAB = 11, 5, 13


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = ((hidden @ weight.T) / temperature).log_softmax(-1)
    counted = (labels != -100).to(logp.dtype)
    chosen = logp[torch.arange(len(labels)), labels.clamp(min=0)]
    return chosen * counted, torch.distributions.Categorical(logits=logp).entropy() * counted


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[::4] = -100
    return torch.randn(tokens, DIM).to(dtype), torch.randn(VOCAB, DIM).to(dtype), labels


def close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[1024, 4, 1], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One chunk, several with a shorter last one, and one a token."""
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
@pytest.mark.parametrize("entropy", [False, True])
def test_equals_log_softmax(entropy: bool, temperature: float, chunk: int) -> None:
    hidden, weight, labels = inputs()
    g, ge = torch.randn(2, TOKENS, dtype=torch.float64)

    def mine(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        if not entropy:
            out = token_logprobs(hidden, weight, labels, temperature=temperature)
            return (out * g).sum(), out
        logp, ent = token_logprobs(hidden, weight, labels, temperature=temperature, entropy=True)
        return (logp * g).sum() + (ent * ge).sum(), (logp, ent)

    def theirs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        logp, ent = oracle(hidden, weight, labels, temperature)
        total = (logp * g).sum() + ((ent * ge).sum() if entropy else 0)
        return total, (logp, ent) if entropy else logp

    got = value_and_grad(mine, (0, 1), has_aux=True)(hidden, weight)
    close(got, torch.func.grad_and_value(theirs, (0, 1), has_aux=True)(hidden, weight)[::-1])


def test_entropy_alone_and_logp_alone(chunk: int) -> None:
    """Both are computed, one is used: the other's gradient is zero and not left out."""
    hidden, weight, labels = inputs()
    for i in (0, 1):
        got = value_and_grad(
            lambda h, w, i=i: token_logprobs(h, w, labels, temperature=0.7, entropy=True)[i].square().sum(), (0, 1)
        )(hidden, weight)
        expected = torch.func.grad_and_value(lambda h, w, i=i: oracle(h, w, labels, 0.7)[i].square().sum(), (0, 1))
        close(got, expected(hidden, weight)[::-1])


@pytest.mark.parametrize("argnum", [0, 1])
def test_frozen_weight_or_hidden(argnum: int, chunk: int) -> None:
    hidden, weight, labels = inputs()
    _, got = value_and_grad(lambda *x: token_logprobs(*x, labels).square().sum(), argnum)(hidden, weight)
    expected = torch.func.grad(lambda *x: oracle(*x, labels, 1.0)[0].square().sum(), argnum)(hidden, weight)
    close(got, expected)


def test_no_label_no_gradient(chunk: int) -> None:
    hidden, weight, labels = inputs()
    f = value_and_grad(lambda *x: sum(y.sum() for y in token_logprobs(*x, labels, entropy=True)), (0, 1))
    _, (d_hidden, _) = f(hidden, weight)
    assert torch.equal(d_hidden[::4], torch.zeros(3, DIM, dtype=torch.float64))
    assert d_hidden[1].abs().min() > 0
    out = token_logprobs(hidden, weight, labels, entropy=True)
    assert all(torch.equal(y[::4], torch.zeros(3, dtype=torch.float64)) for y in out)
    labels = torch.full_like(labels, -100)
    value, grads = f(hidden, weight)
    assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, chunk: int) -> None:
    """Float32 out, the inputs' dtype in the gradients, accurate to one rounding of each."""
    hidden, weight, labels = inputs(dtype)

    def f(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logp = token_logprobs(hidden, weight, labels)
        return logp.square().sum(), logp

    ((_, logp), grads) = value_and_grad(f, (0, 1), has_aux=True)(hidden, weight)
    assert logp.dtype == torch.float32 and [g.dtype for g in grads] == [dtype, dtype]
    wide = hidden.double(), weight.double()
    eps = torch.finfo(dtype).eps
    expected, _ = oracle(*wide, labels, 1.0)
    assert (logp - expected).norm() < eps * expected.norm()
    _, exact = value_and_grad(lambda h, w: oracle(h, w, labels, 1.0)[0].square().sum(), (0, 1))(*wide)
    for got, want in zip(grads, exact, strict=True):
        assert (got.double() - want).norm() < 4 * eps * want.norm()


def test_the_weight_gradient_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of 200 chunks kept in bfloat16 would lose what is small beside it."""
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: 2)
    hidden, weight = torch.rand(400, DIM).bfloat16(), torch.randn(VOCAB, DIM).bfloat16()
    labels = torch.zeros(400, dtype=torch.int64)
    _, got = value_and_grad(lambda w: token_logprobs(hidden, w, labels).sum())(weight)
    _, exact = value_and_grad(lambda w: oracle(hidden.double(), w, labels, 1.0)[0].sum())(weight.double())
    assert (got.double() - exact).norm() < torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("size", [1e4, 1e5])
def test_extreme_logits(size: float) -> None:
    """The spread of the logits counts, not their size: a common offset of 1e4 leaves the entropy what it is."""
    labels = torch.tensor([0, 1, -100])
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [size, size]])
    weight = torch.tensor([[size, 0.0], [-size, 0.0], [0.0, size]])
    f = value_and_grad(lambda *x: sum(y.sum() for y in token_logprobs(*x, labels, entropy=True)), (0, 1))
    value, grads = f(hidden, weight)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)

    hidden = torch.cat([torch.randn(9, 3), torch.full((9, 1), size)], 1)
    weight = torch.cat([torch.randn(20, 3), torch.ones(20, 1)], 1)
    labels = torch.arange(9)
    _, entropy = token_logprobs(hidden, weight, labels, entropy=True)
    rounded = (hidden @ weight.T).double()  # at this size float32 logits are multiples of 2^-10 or 2^-7
    expected = torch.distributions.Categorical(logits=rounded).entropy()
    assert (entropy - expected).abs().max() < 40 * torch.finfo(torch.float32).eps * size
    plain = torch.func.vmap(lambda h: token_logprobs(h, weight, labels, entropy=True)[1])(hidden[None])[0]
    assert (plain - expected).abs().max() < 40 * torch.finfo(torch.float32).eps * size


class Sizes(TorchDispatchMode):
    """Remember the number of elements of the largest result of any operation, and count matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        self.products += func == torch.ops.aten.mm.default
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_never_holds_tokens_times_vocab(entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # 128 tokens a chunk
    tokens, vocab, dim = 1000, 300, 4
    hidden, weight, labels = torch.randn(tokens, dim), torch.randn(vocab, dim), torch.randint(0, vocab, (tokens,))

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        out = token_logprobs(hidden, weight, labels, temperature=0.5, entropy=entropy)
        return sum(y.sum() for y in out) if entropy else out.sum()

    with Sizes() as mine:
        value_and_grad(f, (0, 1))(hidden, weight)
    assert 128 * vocab <= mine.largest < 129 * vocab
    with Sizes() as whole:
        value_and_grad(lambda *x: oracle(*x, labels, 0.5)[0].sum(), (0, 1))(hidden, weight)
    assert whole.largest == tokens * vocab


@pytest.mark.parametrize(("argnums", "products"), [((0, 1), 4), (0, 3), (1, 3)])
def test_computes_only_the_gradients_that_are_wanted(argnums: Any, products: int) -> None:
    hidden, weight, labels = inputs()
    with Sizes() as sizes:
        value_and_grad(lambda *x: token_logprobs(*x, labels).sum(), argnums)(hidden, weight)
    assert sizes.products == products


def test_chunk_is_bounded_both_ways() -> None:
    assert head._chunk(10, 4) == 1024
    assert head._chunk(10**9, 4) == 128
    assert head._chunk(128256, 4) == head.CHUNK_BYTES // (128256 * 4)


def test_differentiated_twice() -> None:
    hidden, weight, labels = inputs(tokens=4)
    hidden.requires_grad_(), weight.requires_grad_()
    for entropy in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda h, w, e=entropy: token_logprobs(h, w, labels, temperature=0.7, entropy=e), (hidden, weight)
        )


@pytest.mark.parametrize("argnum", [0, 1])
def test_differentiated_twice_with_one_of_the_two_frozen(argnum: int) -> None:
    hidden, weight, labels = inputs(tokens=4)

    def norm(f: Any) -> Any:
        return lambda *x: value_and_grad(f, argnum)(*x)[1].square().sum()

    got = value_and_grad(norm(lambda *x: token_logprobs(*x, labels).sum()), argnum)(hidden, weight)
    close(got, value_and_grad(norm(lambda *x: oracle(*x, labels, 1.0)[0].sum()), argnum)(hidden, weight))


def test_a_tied_head_is_differentiated_twice() -> None:
    """Hidden states computed from the weight itself: its gradient here is the head's part, counted once."""
    _, weight, labels = inputs()

    def norm(f: Any) -> Any:
        def loss(weight: Tensor) -> Tensor:
            return f(torch.tanh(weight[:TOKENS]), weight)

        return lambda weight: value_and_grad(loss)(weight)[1].square().sum()

    got = value_and_grad(norm(lambda *x: token_logprobs(*x, labels, temperature=0.7).sum()))(weight)
    expected = value_and_grad(norm(lambda *x: oracle(*x, labels, 0.7)[0].sum()))(weight)
    close(got, expected)
    close(torch.func.grad(norm(lambda *x: token_logprobs(*x, labels, temperature=0.7).sum()))(weight), expected[1])


# Forward mode makes torch load decompositions of its own through the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_under_torch_func() -> None:
    hidden, weight, labels = inputs(tokens=6)

    def mine(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logp, entropy = token_logprobs(h, w, y, temperature=0.7, entropy=True)
        return (logp + 0.3 * entropy).square().sum()

    def theirs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logp, entropy = oracle(h, w, y, 0.7)
        return (logp + 0.3 * entropy).square().sum()

    parts = hidden.reshape(3, 2, DIM), labels.reshape(3, 2)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(hidden, weight, labels),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), in_dims=(0, None, 0))(parts[0], weight, parts[1]),
        lambda f: torch.func.hessian(f)(hidden, weight, labels),
    ):
        close(transform(mine), transform(theirs), 1e-10)


def test_head_logits() -> None:
    hidden, weight, _ = inputs(torch.bfloat16)
    got = head_logits(hidden, weight, temperature=0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (hidden @ weight.T).float() * 2, rtol=0, atol=0)
    hidden, weight, _ = inputs()
    torch.testing.assert_close(head_logits(hidden, weight), hidden @ weight.T, rtol=0, atol=0)


def test_inputs_are_not_changed() -> None:
    given = inputs()
    before = [x.clone() for x in given]
    value_and_grad(lambda *x: sum(y.sum() for y in token_logprobs(*x, given[2], entropy=True)), (0, 1))(*given[:2])
    assert all(torch.equal(x, old) for x, old in zip(given, before, strict=True))


def test_no_tokens() -> None:
    value, grads = value_and_grad(lambda h, w: token_logprobs(h, w, torch.zeros(0, dtype=torch.int64)).sum(), (0, 1))(
        torch.zeros(0, 3), torch.ones(4, 3)
    )
    assert value == 0 and not grads[1].any()


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
def test_bad_temperature(temperature: float) -> None:
    hidden, weight, labels = inputs()
    for name, call in (("token_logprobs", lambda **k: token_logprobs(hidden, weight, labels, **k)),
                       ("head_logits", lambda **k: head_logits(hidden, weight, **k))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: temperature is {temperature}; pass a positive number"):
            call(temperature=temperature)
        with pytest.raises(TypeError, match=f"{name}: temperature is a tensor, and no gradient reaches it"):
            call(temperature=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([0, 13])), "token_logprobs: label 13 at place 1 is not in the vocabulary of 13"),
        (dict(labels=torch.tensor([0, -1])), "token_logprobs: label -1 at place 1 is not in the vocabulary"),
        (dict(labels=torch.tensor([0])), r"hidden \(2, 5\) and labels \(1,\) do not fit"),
        (dict(labels=torch.tensor([[0, 1]])), r"labels \(1, 2\) do not fit"),
        (dict(hidden=torch.zeros(2, 4)), r"hidden is torch.float32 \(2, 4\) and weight torch.float32 \(13, 5\)"),
        (dict(hidden=torch.zeros(1, 2, 5)), r"hidden \(1, 2, 5\) and labels \(2,\) do not fit"),
        (dict(weight=torch.zeros(13, 5, 1)), r"they are \[tokens, dim\] and \[vocab, dim\], of one dtype"),
        (dict(weight=torch.zeros(13, 5).bfloat16()), "and weight torch.bfloat16 .* of one dtype"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given = dict(hidden=torch.zeros(2, 5), weight=torch.zeros(13, 5), labels=torch.tensor([0, 1])) | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**given)
