"""Weights' gradients left as factors: the same gradients, and a compiled block whose backward pass comes in two halves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

import fstep
from fstep import Mesh, Ratio, Stages
from fstep.grad.halves import backward_halves, backward_whole
from fstep.testing import assert_trees_close
from tests.grad.test_halves import Hold, Matmuls, Token

DIM, WIDE = 6, 10
Params = dict[str, Tensor]


def block(p: Params, x: Tensor) -> Tensor:
    """Two weights of one input, a bias, a scale, and one of another input."""
    h = fstep.rms_norm(x, p["norm"], eps=1e-5)
    return x + fstep.linear(F.silu(fstep.linear(h, p["gate"], p["bias"])) * fstep.linear(h, p["up"]), p["down"])


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    shapes = {"norm": (DIM,), "gate": (WIDE, DIM), "bias": (WIDE,), "up": (WIDE, DIM), "down": (DIM, WIDE)}
    key = fstep.Key.seed(seed)
    return {n: key.fold_in(i).normal(s, dtype=torch.float64).to(dtype) for i, (n, s) in enumerate(shapes.items())}


def rows(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return fstep.Key.seed(seed).normal((5, DIM), dtype=torch.float64).to(dtype)


compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
THROUGH: dict[str, Callable[[Any], Any] | None] = {
    "as it is": None,
    "remat": fstep.remat,
    "compiled": compiled,
    "compiled remat": lambda f: compiled(fstep.remat(f)),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("how", THROUGH)
def test_the_same_values_and_gradients(how: str) -> None:
    split = fstep.split_weights(block, through=THROUGH[how])
    loss = lambda f: fstep.value_and_grad(lambda p, x: (f(p, x) * rows(9)).sum(), argnums=(0, 1))(draw(0), rows(1))  # noqa: E731
    (want, want_grads), (got, got_grads) = loss(block), loss(split)
    assert torch.equal(got, want)
    for a, b in zip(fstep.tree_leaves(got_grads), fstep.tree_leaves(want_grads), strict=True):
        assert torch.equal(a, b)


class Pass:
    """Two blocks over three microbatches, split or not, and what is asked of the backward pass."""

    def __init__(self, f: Callable[..., Tensor], dtype: torch.dtype = torch.float64, first: bool = False) -> None:
        self.params = [{n: w.requires_grad_() for n, w in draw(seed, dtype).items()} for seed in (0, 1)]
        self.leaves = fstep.tree_leaves(self.params)
        self.f, self.dtype, self.first = f, dtype, first

    def forward(self, seed: int) -> tuple[Tensor, list[Tensor]]:
        x = rows(seed, self.dtype)
        inputs = [] if self.first else [x.requires_grad_()]
        return self.f(self.params[1], torch.tanh(self.f(self.params[0], x))), inputs

    def grads(self, go: Callable[..., list[Any]]) -> list[Any]:
        """Return the inputs' gradients and the leaves'."""
        found, later = [], []
        for seed in (3, 4, 5):
            y, inputs = self.forward(seed)
            dx = go(self, y, rows(seed + 10, self.dtype), inputs, later)
            found += dx if inputs else []
        for half in later:
            half()
        return [*found, *(x.grad for x in self.leaves)]


def whole(p: Pass, y: Tensor, c: Tensor, inputs: list[Tensor], later: list[Any]) -> list[Any]:
    backward_whole([get_gradient_edge(y)], [c], [*p.leaves, *inputs])
    return [x.grad for x in inputs]


def halves(p: Pass, y: Tensor, c: Tensor, inputs: list[Tensor], later: list[Any]) -> list[Any]:
    before = [None if x.grad is None else x.grad.clone() for x in p.leaves]
    dx, half = backward_halves([get_gradient_edge(y)], [c], inputs, p.leaves)
    for x, g in zip(p.leaves, before, strict=True):
        if x.dim() == 2:
            assert x.grad is None or torch.equal(x.grad, g), "the first half leaves the matrices alone"
    later.append(half)
    return dx


@pytest.mark.parametrize("first", [False, True], ids=["middle stage", "first stage"])
@pytest.mark.parametrize("go", [whole, halves])
@pytest.mark.parametrize("how", THROUGH)
def test_one_backward_pass_or_two_halves(how: str, go: Callable, first: bool) -> None:
    plain = Pass(block, first=first)
    want = plain.grads(lambda p, y, c, inputs, later: (y.backward(c), [x.grad for x in inputs])[1])
    got = Pass(fstep.split_weights(block, through=THROUGH[how]), first=first).grads(go)
    assert len(got) == len(want) == (10 if first else 13)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_halves", [False, True])
def test_16_bit_products_are_rounded_once(in_halves: bool) -> None:
    """Added inside the product, they are nearer to the exact sum than products that are rounded and then added."""
    low = torch.bfloat16
    w, plain = (draw(0, low)["up"].requires_grad_() for _ in range(2))
    exact = torch.zeros(WIDE, DIM, dtype=torch.float64)
    split = fstep.split_weights(lambda p, x: fstep.linear(x, p["w"]), through=fstep.remat)
    for m in range(16):
        x, g = rows(m, low).requires_grad_(), fstep.Key.seed(50 + m).normal((5, WIDE)).to(low)
        F.linear(x, plain).backward(g)
        edges = [get_gradient_edge(split({"w": w}, x))]
        if in_halves:
            backward_halves(edges, [g], [x], [w])[1]()
        else:
            backward_whole(edges, [g], [w, x])
        exact += g.double().T @ x.detach().double()
    assert w.grad is not None and plain.grad is not None and w.grad.dtype == low and not w.grad.requires_grad
    once, twice = (float((t.double() - exact).norm() / exact.norm()) for t in (w.grad, plain.grad))
    assert once < 0.95 * twice < 0.02, (once, twice)


def test_each_half_multiplies_what_is_its_own() -> None:
    """Two blocks of three maps: 6 products forward, 6 for the input's gradient and 6 again, 6 for the weights'."""
    p = Pass(fstep.split_weights(block, through=fstep.remat))
    with Matmuls() as forward:
        y, inputs = p.forward(2)
    with Matmuls() as first:
        _, later = backward_halves([get_gradient_edge(y)], [rows(3)], inputs, p.leaves)
    with Matmuls() as second:
        later()
    assert (forward.count, first.count, second.count) == (6, 12, 6)


def tied(f: Callable[..., Tensor], p: Params, x: Tensor) -> Tensor:
    """A matrix that the block has, and something else too."""
    return f(p, x) @ p["up"].T


def made_of_the_input(f: Callable[..., Tensor], p: Params, x: Tensor) -> Tensor:
    """A matrix that depends on what the input's gradient is asked of, as one that is gathered behind it does."""
    return f({**p, "up": p["up"] * x.mean(), "gate": p["gate"] + 0.0}, x)


@pytest.mark.parametrize("use", [tied, made_of_the_input])
def test_products_that_cannot_wait(use: Callable[..., Tensor]) -> None:
    def grads(f: Callable[..., Tensor], go: Callable[..., Any]) -> list[Any]:
        p, x = {n: w.requires_grad_() for n, w in draw(0).items()}, rows(1).requires_grad_()
        dx = go(use(f, p, x), list(p.values()), x)
        return [dx, *(w.grad for w in p.values())]

    def in_halves(y: Tensor, leaves: list[Tensor], x: Tensor) -> Any:
        (dx,), later = backward_halves([get_gradient_edge(y)], [torch.ones_like(y)], [x], leaves)
        later()
        return dx

    def at_once(y: Tensor, leaves: list[Tensor], x: Tensor) -> Any:
        y.sum().backward(inputs=[*leaves, x])
        return x.grad

    for how in ("remat", "compiled"):
        got = grads(fstep.split_weights(block, through=THROUGH[how]), in_halves)
        for a, b in zip(got, grads(block, at_once), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_frozen_weights_and_refused_ones_are_differentiated_as_usual() -> None:
    seen: list[Any] = []

    def watched(p: Params, x: Tensor) -> Tensor:
        seen.append({n: type(w).__name__ for n, w in p.items()})
        return block(p, x)

    split = fstep.split_weights(watched, only=lambda path: path != "up")
    f = lambda p, x: (split(p, x) * rows(9)).sum()  # noqa: E731
    trainable = lambda path: path != "gate"  # noqa: E731
    got = fstep.value_and_grad(f, trainable=trainable)(draw(0), rows(1))[1]
    want = fstep.value_and_grad(lambda p, x: (block(p, x) * rows(9)).sum(), trainable=trainable)(draw(0), rows(1))[1]
    assert got["gate"] is None and all(torch.equal(got[n], want[n]) for n in want if n != "gate")
    assert seen == [{"norm": "Tensor", "gate": "Tensor", "bias": "Tensor", "up": "Tensor", "down": "Factored"}]
    with torch.no_grad():
        params = {n: w.requires_grad_() for n, w in draw(0).items()}
        assert torch.equal(split(params, rows(1)), block(params, rows(1))) and seen[-1]["down"] == "Tensor"


def test_integers_and_complex_weights_are_differentiated_as_usual() -> None:
    for dtype in (torch.float64, torch.complex128):
        w = torch.randn(WIDE, DIM, dtype=dtype, requires_grad=True)
        x = torch.arange(2 * DIM).view(2, DIM) if dtype == torch.float64 else torch.randn(2, DIM, dtype=dtype)

        def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return fstep.linear(x.to(p["w"].dtype), p["w"]).abs().square()

        want, got = (torch.autograd.grad(g({"w": w}, x).sum(), w)[0] for g in (f, fstep.split_weights(f)))
        assert want.abs().max() > 0 and torch.equal(got, want)


def test_weights_of_two_blocks_that_were_made_together() -> None:
    """Their products end in one graph, which can be gone through once."""
    one = fstep.split_weights(lambda p, x: fstep.linear(x, p["w"]))
    w, x = torch.randn(DIM, DIM, dtype=torch.float64, requires_grad=True), rows(1).requires_grad_()

    def two(x: Tensor) -> Tensor:
        made = {"w": w.tanh()}
        return one(made, one(made, x))

    g = torch.randn_like(two(x))
    want = torch.autograd.grad(torch.nn.functional.linear(torch.nn.functional.linear(x, w.tanh()), w.tanh()), [x, w], g)
    (dx,), second = backward_halves([get_gradient_edge(two(x))], [g], [x], [w])
    second()
    torch.testing.assert_close((dx, w.grad), want, rtol=1e-12, atol=1e-12)


def test_wider_master_weights() -> None:
    """float32 weights, computed with in bfloat16: the product is not rounded to 16 bits before it is a gradient."""
    p = {n: w.requires_grad_() for n, w in draw(0, torch.float32).items()}
    y = fstep.split_weights(lambda p, x: fstep.linear(x, p["up"]))(p, rows(1, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(y, p["up"], torch.ones_like(y))
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, rows(1, torch.bfloat16).float().sum(0).expand(WIDE, DIM), rtol=1e-2, atol=1e-2)


def test_what_cannot_be_split_says_so() -> None:
    twice = fstep.split_weights(lambda p, x: fstep.linear(fstep.linear(x, p["w"]), p["w"]))
    other = fstep.split_weights(lambda p, x: fstep.linear(x[:2], p["w"]))
    w = {"w": torch.ones(DIM, DIM, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match="split_weights: 'w' is used twice; leave it out, with only="):
        twice(w, rows(1))
    with pytest.raises(ValueError, match=r"'w' is applied to \[2, 6\] in torch.float64, where x has \[5\] in torch.float64"):
        other(w, rows(1))
    wider = fstep.split_weights(lambda p, x: fstep.linear(x.double(), p["w"]))  # its factors would be rounded to 16 bits
    with pytest.raises(ValueError, match=r"'w' is applied to .* in torch.float64, where x has .* in torch.bfloat16"):
        wider(w, rows(1, torch.bfloat16))
    with pytest.raises(TypeError, match="split_weights: x is a int"):
        twice(w, 3)
    y = fstep.split_weights(block)({n: w.requires_grad_() for n, w in draw(0).items()}, x := rows(1).requires_grad_())
    with pytest.raises(RuntimeError, match="split_weights: a gradient of gradients"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_nothing_is_left_after_the_second_half() -> None:
    split, params, token = fstep.split_weights(block, through=compiled), Pass(block).params, Token()
    seen = weakref.ref(token)
    gc.disable()
    try:
        x = rows(1).requires_grad_()
        y = split(params[1], Hold.apply(split(params[0], x), token))  # type: ignore[no-untyped-call]
        del token
        _, later = backward_halves([get_gradient_edge(y)], [rows(2)], [x], fstep.tree_leaves(params))
        del y
        later()
        assert seen() is None, "the graph is kept alive, without the garbage collector"
    finally:
        gc.enable()


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_zero_bubble"])
@pytest.mark.parametrize("how", ["compiled", "remat"])
def test_a_pipeline_of_split_blocks_is_one_process_to_the_bit(schedule: str, how: str) -> None:
    layers = {i: draw(20 + i) for i in range(4)}
    split = fstep.split_weights(block, through=THROUGH[how])
    mbs = [rows(40 + m)[: 5 - m % 2] for m in range(5)]

    def stage(params: Any, x: Any, mb: Tensor, f: Callable[..., Tensor] = split) -> Tensor:
        x = mb if x is None else x
        for i in sorted(params):
            x = f(params[i], x)
        return x

    def loss(params: Any, x: Tensor, mb: Tensor) -> Ratio:
        return Ratio((x * mb.flip(0)).sum(), torch.tensor(float(len(x))))

    want_loss, want = fstep.pp_forward_backward(partial(stage, f=block), loss, layers, mbs)

    def run(mesh: Mesh) -> Any:
        where = fstep.stage_ranks(schedule, 2)
        each = len(layers) // len(where)
        mine = {s: {i: layers[i] for i in range(s * each, (s + 1) * each)} for s, r in enumerate(where) if r == mesh.pp.rank}
        own = Stages(mine) if len(mine) > 1 else next(iter(mine.values()))
        return fstep.pp_forward_backward(stage, loss, own, mbs, axis=mesh.pp, schedule=schedule)

    found = {}
    for got_loss, grads in fstep.simulate(run, pp=2):
        assert torch.equal(got_loss.num, want_loss.num)
        found |= dict(zip(fstep.tree_paths(grads), fstep.tree_leaves(grads), strict=True))
    wanted = dict(zip(fstep.tree_paths(want), fstep.tree_leaves(want), strict=True))
    assert found.keys() == wanted.keys()
    for path, g in found.items():
        assert torch.equal(g, wanted[path]), path


@pytest.mark.parametrize("wrap", ["remat", "split"])
@pytest.mark.parametrize("schedule", ["zbv", "interleaved_zero_bubble", "dualpipev"])
def test_gradients_that_are_one_tensor(schedule: str, wrap: str) -> None:
    """Of two leaves that are added, of a leaf and of what is passed on: none may be added into."""

    def block(q: Any, x: Tensor) -> Tensor:
        return torch.tanh(x) + (q["a"] + q["b"]) + q["like_x"] + fstep.linear(x, q["w"])

    f = fstep.remat(block)
    if wrap == "split":
        f = fstep.split_weights(block, through=fstep.remat, only=lambda path: path == "w")
    zeros = {"a": torch.zeros(2), "b": torch.zeros(2), "like_x": torch.zeros(1, 2), "w": torch.full((2, 2), 0.3)}
    params = dict.fromkeys(range(4), zeros)
    one, mbs = torch.tensor(1.0), [torch.full((1, 2), 0.1 * k) for k in range(6)]

    def run(q: Any, x: Any, mb: Tensor) -> Tensor:
        x = mb if x is None else x
        for s in sorted(q):
            x = f(q[s], x)
        return x

    def loss(q: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
        return fstep.Ratio(x.sum(), one)

    want = fstep.pp_forward_backward(lambda q, x, mb: run(q, None, mb), loss, params, mbs)[1]

    def on(mesh: fstep.Mesh) -> Any:
        mine = fstep.stage_ranks(schedule, 2)
        own = fstep.Stages({s: {s: params[s]} for s in range(4) if mine[s] == mesh.pp.rank})
        return fstep.pp_forward_backward(run, loss, own, mbs, axis=mesh.pp, schedule=schedule)[1]

    for grads in fstep.simulate(on, pp=2):
        for s, part in grads.parts.items():
            assert_trees_close(part[s], want[s], rtol=1e-5)


def test_a_bias_is_rounded_once() -> None:
    """As by torch's linear: in bfloat16 the product with the bias, not first the one and then the sum."""
    key = fstep.Key.seed(0)
    x, w, b = (key.fold_in(i).normal(n).bfloat16() for i, n in enumerate(((5, 16), (8, 16), (8,))))
    block = lambda p, x: fstep.linear(x, p["w"], p["b"])  # noqa: E731
    run = lambda p, f: f(p, x).float().square().sum()  # noqa: E731
    for f in (fstep.split_weights(block), fstep.split_weights(block, through=fstep.remat)):
        (a, got), (c, want) = (fstep.value_and_grad(run)({"w": w, "b": b}, g) for g in (f, block))
        assert a == c and torch.equal(got["w"], want["w"]) and torch.equal(got["b"], want["b"])


def test_autocast() -> None:
    block = lambda p, x: fstep.linear(x, p["w"], p["b"])  # noqa: E731
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}

    def run(p: Any, f: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return f(p, torch.ones(2, 4)).float().sum()

    got, want = (fstep.value_and_grad(run)(params, f)[1] for f in (fstep.split_weights(block), block))
    assert_trees_close(got, want, rtol=1e-2)
