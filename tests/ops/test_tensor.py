"""Tensor parallel functions beside their one-process counterparts on the whole, values and transposes, on 1 to 4 ranks.

The law of a transpose is the one of tests/mesh/cases.py: what the outputs and their gradients make together over the ranks
is what the inputs and theirs do; a value that is replicated together with its gradient counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
from fstep import Key, Mesh, Shard
from fstep.ops import head

DIM, VOCAB = 5, 13
F64 = torch.float64
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])
lengths = pytest.mark.parametrize("tokens", [0, 1, 6, 12])  # 6 leaves a rank of 4 without a token, 12 divides evenly


def randn(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return Key.seed(seed).normal(shape, dtype=F64).to(dtype)


def share(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's tokens, padded with numbers that nobody may see."""
    rows = -(-len(x) // mesh.tp.size)
    junk = torch.full((rows * mesh.tp.size - len(x), *x.shape[1:]), 1e3, dtype=x.dtype)
    return torch.cat([x, junk])[mesh.tp.rank * rows :][:rows].clone()


def together(parts: list[Tensor], tokens: int) -> Tensor:
    return torch.cat(parts)[:tokens]


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(fstep.tree_leaves(got), fstep.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pull(f: Callable[..., Tensor], y: Tensor, *xs: Any) -> tuple[Tensor, Any]:
    """The output and the gradients of all arguments, for the gradient ``y`` of the output."""
    out, back = fstep.vjp(f, *xs)
    return out, back(y)


@sizes
@lengths
def test_gather(tokens: int, size: int) -> None:
    x, ys = randn(0, tokens, 2), [randn(1 + r, tokens, 2) for r in range(size)]

    def f(mesh: Mesh) -> Any:
        return pull(lambda x: fstep.tp_gather(x, axis=mesh.tp, tokens=tokens), ys[mesh.tp.rank], share(x, mesh))

    got = fstep.simulate(f, tp=size)
    assert all(torch.equal(out, x) for out, _ in got)
    close(together([g for _, (g,) in got], tokens), sum(ys))
    assert not torch.cat([g for _, (g,) in got])[tokens:].any(), "rows that stand for no token have no gradient"


@sizes
@lengths
def test_scatter(tokens: int, size: int) -> None:
    xs, y = [randn(r, tokens, 2) for r in range(size)], randn(9, tokens, 2)

    def f(mesh: Mesh) -> Any:
        return pull(lambda x: fstep.tp_scatter(x, axis=mesh.tp), share(y, mesh), xs[mesh.tp.rank])

    got = fstep.simulate(f, tp=size)
    close(torch.cat([out for out, _ in got]), torch.cat([sum(xs), torch.zeros(-tokens % size, 2, dtype=F64)]))
    for _, (g,) in got:
        assert torch.equal(g, y)


@sizes
@lengths
@pytest.mark.parametrize("bias", [False, True])
def test_row_linear(tokens: int, size: int, bias: bool) -> None:
    x, weight, b, y = randn(0, tokens, 7), randn(1, DIM, 7), randn(2, DIM) if bias else None, randn(3, tokens, DIM)

    def f(mesh: Mesh) -> Any:
        part = Shard.cut(weight, axis=mesh.tp, dim=1)
        feature = Shard.cut(x, axis=mesh.tp, dim=1)
        back = share(y, mesh)
        back[back == 1e3] = 0  # what is behind is cut off before anybody looks at it
        out, grads = pull(
            lambda *args: fstep.tp_row_linear(*args, axis=mesh.tp), back, fstep.bare(feature), part, *([b] if bias else [])
        )
        return out, fstep.bare(grads)

    got = fstep.simulate(f, tp=size)
    want, (gx, gw, *gb) = pull(fstep.linear, y, x, weight, *([b] if bias else []))
    assert all(out.shape == (-(-tokens // size), DIM) for out, _ in got)
    close(together([out for out, _ in got], tokens), want)
    close(torch.cat([g[0] for _, g in got], 1), gx)
    close(torch.cat([g[1] for _, g in got], 1), gw)
    if bias:
        close(sum(g[2] for _, g in got), *gb)  # partial sums


@sizes
@lengths
def test_embed(tokens: int, size: int) -> None:
    ids, table, y = torch.arange(tokens) * 7 % VOCAB, randn(0, VOCAB, DIM), randn(1, tokens, DIM)

    def f(mesh: Mesh) -> Any:
        part = Shard.cut(table, axis=mesh.tp, dim=0)
        out, (g,) = pull(lambda w: fstep.tp_embed(ids, w, axis=mesh.tp), share(y, mesh), part)
        return out, fstep.bare(g)

    got = fstep.simulate(f, tp=size)
    want, (g,) = pull(lambda w: fstep.embed(ids, w), y, table)
    assert torch.equal(together([out for out, _ in got], tokens), want)
    close(torch.cat([g for _, g in got]), g)


@sizes
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_local(size: int, dtype: torch.dtype) -> None:
    """One sum for all replicated leaves of a dtype; shards and frozen leaves communicate nothing."""

    def f(mesh: Mesh) -> Any:
        tree = {
            "norm": randn(0, 3).requires_grad_(),
            "b": {"bias": randn(1, 2, 2).to(dtype).requires_grad_(), "frozen": randn(2, 2), "none": None},
            "q": Shard(randn(3, 2).requires_grad_(), mesh.tp, 0, (0, 2), 2 * size) if size > 1 else randn(3, 2),
            "ids": torch.arange(2),
        }
        local = fstep.tp_local(tree, axis=mesh.tp)
        if size == 1:
            assert local is tree
        assert isinstance(local["q"], Tensor) and local["b"]["frozen"] is tree["b"]["frozen"]
        r = mesh.tp.rank + 1
        leaves = [tree["norm"], tree["b"]["bias"], fstep.bare(tree["q"]).requires_grad_()]
        outs = [local["norm"], local["b"]["bias"], local["q"]]
        assert all(torch.equal(a, b) for a, b in zip(leaves, outs, strict=True))
        return torch.autograd.grad(outs, leaves, [torch.full_like(x, r) for x in outs])

    for r, (norm, bias, q) in enumerate(fstep.simulate(f, tp=size), 1):
        total = size * (size + 1) / 2
        assert (norm == total).all() and (bias == total).all() and (q == r).all()
        assert (norm.shape, bias.shape, bias.dtype) == ((3,), (2, 2), dtype)


def test_local_sums_once_and_can_be_differentiated_again() -> None:
    class Count:
        """A transport that counts."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.calls = inner, 0

        def __getattr__(self, name: str) -> Any:
            self.calls += name != "regroup"
            return getattr(self.inner, name)

    def f(mesh: Mesh) -> Any:
        counter = Count(mesh.tp.transport)
        axis = fstep.Axis("tp", 2, mesh.tp.rank, mesh.tp.ranks, counter)
        w = {str(i): torch.tensor(2.0 + i, dtype=F64, requires_grad=True) for i in range(4)}
        p = fstep.tp_local(w, axis=axis)
        loss = sum((mesh.tp.rank + 1) * p[k] ** 3 for k in p)  # in all 3 w^3: 9 w^2, then 18 w
        first = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        calls = counter.calls
        second = torch.autograd.grad(first, list(w.values()), [torch.ones((), dtype=F64)] * 4)
        return calls, [float(g.detach()) for g in first], [float(g) for g in second]

    for calls, first, second in fstep.simulate(f, tp=2):
        assert calls == 1
        assert first == [9 * (2.0 + i) ** 2 for i in range(4)]
        assert second == [18 * (2.0 + i) for i in range(4)]


# The head ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1024, 4, 1], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One chunk, several with a shorter last one, and one a token."""
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: request.param)
    return request.param


def labels_of(tokens: int) -> Tensor:
    return torch.where(torch.arange(tokens) % 4 == 0, -100, torch.arange(tokens) * 5 % VOCAB)


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = ((hidden @ weight.T) / temperature).log_softmax(-1)
    counted = (labels != -100).to(logp.dtype)
    chosen = logp[torch.arange(len(labels)), labels.clamp(min=0)]
    return chosen * counted, torch.distributions.Categorical(logits=logp, validate_args=False).entropy() * counted


def head_on(mesh: Mesh, hidden: Tensor, weight: Tensor, labels: Tensor, g: Tensor, which: str, **options: Any) -> Any:
    """On one rank: what comes out, and the gradients of a loss that every rank computes alike."""

    def loss(h: Tensor, w: Any) -> tuple[Tensor, Any]:
        out = fstep.tp_token_logprobs(h, w, labels, axis=mesh.tp, entropy=which != "logp", **options)
        outs = out if isinstance(out, tuple) else (out,)
        used = outs[1:] if which == "entropy" else outs
        return sum((x * g[i]).sum() for i, x in enumerate(used)), outs

    (_, outs), (gh, gw) = fstep.value_and_grad(loss, (0, 1), has_aux=True)(
        share(hidden, mesh), Shard.cut(weight, axis=mesh.tp, dim=0)
    )
    return [x.detach() for x in outs], gh, fstep.bare(gw)


@sizes
@pytest.mark.parametrize("which", ["logp", "both", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(which: str, temperature: float, size: int, chunk: int) -> None:
    tokens = 11
    hidden, weight, labels = randn(0, tokens, DIM), randn(1, VOCAB, DIM), labels_of(tokens)
    g = randn(2, 2, tokens)
    got = fstep.simulate(lambda mesh: head_on(mesh, hidden, weight, labels, g, which, temperature=temperature), tp=size)

    def loss(h: Tensor, w: Tensor) -> tuple[Tensor, Any]:
        outs = oracle(h, w, labels, temperature)
        used = {"logp": outs[:1], "both": outs, "entropy": outs[1:]}[which]
        return sum((x * g[i]).sum() for i, x in enumerate(used)), outs

    (_, outs), (gh, gw) = fstep.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    for mine, *_ in got:
        close(mine, [x.detach() for x in outs][: len(mine)])
        assert all(map(torch.equal, mine, got[0][0])), "the same bits on every rank"
    close(together([r[1] for r in got], tokens), gh)
    close(torch.cat([r[2] for r in got]), gw)


@lengths
def test_token_logprobs_of_few_tokens(tokens: int) -> None:
    hidden, weight, labels, g = randn(0, tokens, DIM), randn(1, VOCAB, DIM), labels_of(tokens), randn(2, 2, tokens)
    got = fstep.simulate(lambda mesh: head_on(mesh, hidden, weight, labels, g, "logp"), tp=4)
    _, (gh, gw) = fstep.value_and_grad(lambda h, w: (oracle(h, w, labels, 1.0)[0] * g[0]).sum(), (0, 1))(hidden, weight)
    close(together([r[1] for r in got], tokens), gh)
    close(torch.cat([r[2] for r in got]), gw)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_large_logits_are_no_obstacle(dtype: torch.dtype, offset: float) -> None:
    """Logits far from 0, and one rank's far above the others': no overflow, no NaN, entropy to the last digits."""
    hidden = torch.ones(3, 1, dtype=dtype)
    weight = torch.cat([torch.tensor([0.0, 1.0, -2.0, 1e3]), torch.tensor([0.5, -1e3])])[:, None].to(dtype) + offset
    labels = torch.tensor([3, 0, 5])
    got = fstep.simulate(lambda mesh: head_on(mesh, hidden, weight, labels, torch.ones(2, 3), "both"), tp=3)
    for outs, *_ in got:
        torch.testing.assert_close(outs[0], torch.tensor([0.0, -1e3, -2e3], dtype=dtype), rtol=1e-6, atol=0)
        assert not outs[1].any()
    assert all(x.isfinite().all() for r in got for x in r[1:])
    flat = fstep.simulate(lambda mesh: head_on(mesh, hidden, weight * 0 + offset, labels, torch.ones(2, 3), "both"), tp=3)
    torch.testing.assert_close(flat[1][0][1], torch.full((3,), 6.0, dtype=dtype).log())


@pytest.mark.parametrize("chosen", [[2, 0], [0, 0], [2, 4]], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_ids_that_are_ruled_out(entropy: bool, chosen: list[int]) -> None:
    """Logits of -inf: of one id, of all that a rank has. What one rank makes of them, so do three (of the entropy, NaN)."""
    hidden = torch.full((2, 1), 0.5, dtype=F64)
    weight = torch.tensor([-2.0, -torch.inf, -1000.0, -1001.0, -torch.inf, -torch.inf], dtype=F64)[:, None]
    weight = weight if 0 in chosen else weight.index_fill(0, torch.tensor([0]), -torch.inf)
    labels = torch.tensor(chosen)

    def on(mesh: Mesh) -> Any:
        part = Shard.cut(weight, axis=mesh.tp, dim=0)

        def f(w: Any) -> Any:
            out = fstep.tp_token_logprobs(share(hidden, mesh), w, labels, axis=mesh.tp, entropy=entropy)
            return out if entropy else (out,)

        (_, outs), grad = fstep.value_and_grad(lambda w: ((out := f(w))[0].sum(), out), has_aux=True)(part)
        return outs, grad.value

    def alone(w: Tensor) -> tuple[Tensor, Tensor]:
        if entropy:
            logp, _ = fstep.token_logprobs(hidden, w, labels, entropy=True)
        else:
            logp = fstep.token_logprobs(hidden, w, labels)
        return logp.sum(), logp.detach()

    (_, want), grad = fstep.value_and_grad(alone, has_aux=True)(weight)
    assert want[0].isfinite() and not want.isnan().any() and (entropy or grad.isfinite().all())
    got = fstep.simulate(on, tp=3)
    for (logp, *_), _ in got:
        torch.testing.assert_close(logp.detach(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in got]), grad, rtol=1e-12, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_the_head(dtype: torch.dtype) -> None:
    hidden, weight, labels, g = (
        randn(0, 8, DIM, dtype=dtype),
        randn(1, VOCAB, DIM, dtype=dtype),
        labels_of(8),
        randn(2, 2, 8),
    )
    (outs, gh, gw), _ = fstep.simulate(lambda mesh: head_on(mesh, hidden, weight, labels, g.float(), "both"), tp=2)
    assert {x.dtype for x in outs} == {torch.float32} and gh.dtype == gw.dtype == dtype
    want = oracle(hidden.double(), weight.double(), labels, 1.0)
    for a, b in zip(outs, want, strict=True):
        assert (a - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


def test_second_derivatives_of_the_head() -> None:
    hidden, weight, labels = randn(0, 6, DIM), randn(1, VOCAB, DIM), labels_of(6)

    def norm(f: Callable[..., Any], add: Callable[[Tensor, Tensor], Tensor]) -> Any:
        def of(h: Tensor, w: Any) -> Tensor:
            gh, gw = fstep.value_and_grad(lambda h, w: sum(x.square().sum() for x in f(h, w)), (0, 1))(h, w)[1]
            return add(gh, fstep.bare(gw))

        return fstep.value_and_grad(of, (0, 1))

    def on(mesh: Mesh) -> Any:
        def f(h: Tensor, w: Any) -> Any:
            return fstep.tp_token_logprobs(h, w, labels, axis=mesh.tp, temperature=0.7, entropy=True)

        def add(gh: Tensor, gw: Tensor) -> Tensor:
            return fstep.psum(gh.square().sum() + gw.square().sum(), axis=mesh.tp)

        value, grads = norm(f, add)(share(hidden, mesh), Shard.cut(weight, axis=mesh.tp, dim=0))
        return value, fstep.bare(grads)

    got = fstep.simulate(on, tp=2)
    value, (gh, gw) = norm(lambda h, w: oracle(h, w, labels, 0.7), lambda a, b: a.square().sum() + b.square().sum())(
        hidden, weight
    )
    for r in got:
        close(r[0], value)
    close(torch.cat([r[1][0] for r in got]), gh, 1e-10)
    close(torch.cat([r[1][1] for r in got]), gw, 1e-10)


@sizes
@lengths
def test_head_logits(tokens: int, size: int) -> None:
    hidden, weight, y = randn(0, tokens, DIM), randn(1, VOCAB, DIM), randn(2, tokens, VOCAB)

    def f(mesh: Mesh) -> Any:
        def logits(h: Tensor, w: Any) -> Tensor:
            given = None if size == 1 else tokens
            return fstep.tp_head_logits(h, w, axis=mesh.tp, tokens=given, temperature=0.5)

        out, grads = pull(logits, y, share(hidden, mesh), Shard.cut(weight, axis=mesh.tp, dim=0))
        return out, fstep.bare(grads)

    got = fstep.simulate(f, tp=size)
    want, (gh, gw) = pull(lambda h, w: h @ w.T / 0.5, y, hidden, weight)
    for out, _ in got:
        close(out, want)
    close(together([g[0] for _, g in got], tokens), gh)
    close(torch.cat([g[1] for _, g in got]), gw)


def test_no_rank_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: 8)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            self.size = max([self.size, *(x.numel() for x in fstep.tree_leaves(out) if isinstance(x, Tensor))])
            return out

    def f(mesh: Mesh) -> int:
        part = Shard.cut(randn(1, 100, 2), axis=mesh.tp, dim=0)
        hidden, labels = share(randn(0, 64, 2), mesh), torch.arange(64)
        with Largest() as largest:
            fstep.value_and_grad(
                lambda h, w: fstep.tp_token_logprobs(h, w, labels, axis=mesh.tp, entropy=True)[0].sum(), (0, 1)
            )(hidden, part)
        return largest.size

    assert fstep.simulate(f, tp=2) == [8 * 50] * 2


# Bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, w: fstep.tp_gather(torch.ones(3, 1), axis=a, tokens=4), "tp_gather: x has 3 rows, and a shard of 4 tok"),
        (lambda a, w: fstep.tp_embed(torch.tensor([1]), w, axis=a), "tp_embed: weight is not cut, and axis 'tp' has size 2"),
        (lambda a, w: fstep.tp_embed(torch.tensor([9]), Shard.cut(w, axis=a, dim=0), axis=a), "token 9 .* vocabulary of 4"),
        (
            lambda a, w: fstep.tp_embed(torch.tensor([1]), Shard.cut(w, axis=a, dim=1), axis=a),
            "tp_embed: weight is cut along dim 1 .* dim=0",
        ),
        (
            lambda a, w: fstep.tp_row_linear(torch.ones(1, 1), Shard.cut(w, axis=a, dim=0), axis=a),
            "tp_row_linear: weight is cut along dim 0 .* dim=1",
        ),
        (
            lambda a, w: fstep.tp_token_logprobs(torch.ones(1, 2), w, torch.tensor([0]), axis=a),
            "tp_token_logprobs: weight is not cut",
        ),
        (
            lambda a, w: fstep.tp_token_logprobs(
                torch.ones(1, 2, dtype=F64), Shard.cut(w, axis=a, dim=0), torch.tensor([4]), axis=a
            ),
            "tp_token_logprobs: label 4 at place 0 is not in the vocabulary of 4",
        ),
        (
            lambda a, w: fstep.tp_token_logprobs(torch.ones(1, 3), Shard.cut(w, axis=a, dim=0), torch.tensor([0]), axis=a),
            "tp_token_logprobs: hidden is",
        ),
        (
            lambda a, w: fstep.tp_token_logprobs(
                torch.ones(1, 2, dtype=F64), Shard.cut(w, axis=a, dim=0), torch.tensor([[1, 1]]), axis=a
            ),
            r"tp_token_logprobs: hidden \(1, 2\) and labels \(1, 2\) do not fit; they are a shard",
        ),
        (lambda a, w: fstep.tp_head_logits(torch.ones(1, 2), w, axis=a), "tp_head_logits: weight is not cut"),
        (
            lambda a, w: fstep.tp_embed(torch.tensor([0]), Shard.cut(w[:1], axis=a, dim=0), axis=a),
            "tp_embed: weight has length 1 along dim 0, less than the 2 ranks of axis 'tp', .*; use 1 ranks or fewer",
        ),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fstep.simulate(lambda mesh: call(mesh.tp, randn(0, 4, 2)), tp=2)


def test_a_shard_of_another_mesh_is_refused() -> None:
    part = fstep.simulate(lambda mesh: Shard.cut(randn(0, 4, 2), axis=mesh.tp, dim=0), tp=2)[0]
    with pytest.raises(ValueError, match=r"weight is cut along dim 0 over .*, and axis 'tp' has size 1; .* mesh=mesh"):
        fstep.tp_embed(torch.tensor([0]), part, axis=Mesh().tp)
