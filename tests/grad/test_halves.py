"""A backward pass in two halves gives the gradients of one, and costs as much."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
from fstep.grad.engine import from_function, run_engine
from fstep.grad.halves import backward_halves


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Scale(torch.autograd.Function):
    """A user's own function: both gradients come out of one call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def mlp(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(torch.tanh(x @ w[0].T) @ w[1].T)]


def shared(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(torch.tanh(x @ w[0].T) @ w[0].T) @ w[1].T]


def cast_once_used_twice(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    low = w[0].float().double()
    return [torch.tanh(x @ low) @ low + fstep.rms_norm(x, w[2], eps=1e-6) @ w[1]]


def views_of_one_leaf(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(x @ w[0][:2].T @ w[0][2:4]) + w[2]]


def own_function(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [Scale.apply(torch.tanh(x @ w[0]), w[2]) @ w[1]]  # type: ignore[no-untyped-call]


def own_function_of_the_weights(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [Scale.apply(torch.tanh(x @ Scale.apply(w[0], w[2])), w[2])]  # type: ignore[no-untyped-call]


def several_outputs(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    h = torch.tanh(x @ w[0])
    return [h @ w[1], h.sum() * w[2], w[1].square(), x]  # one apart from x, and x itself


def several_paths(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    h = x @ w[0]
    return [(h * torch.sigmoid(x @ w[1])).sum(-1) + (h @ w[0]).square().sum(-1)]


def nothing_of_the_input(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [w[0] @ w[1]]


CASES = [
    mlp,
    shared,
    cast_once_used_twice,
    views_of_one_leaf,
    own_function,
    several_outputs,
    several_paths,
    nothing_of_the_input,
]


@pytest.mark.parametrize("f", CASES)
@pytest.mark.parametrize("inputs", [True, False], ids=["middle stage", "first stage"])
def test_two_halves_are_one_backward_pass_bit_for_bit(f: Callable, inputs: bool) -> None:
    torch.manual_seed(0)
    x, w = leaf(5, 4), [leaf(4, 4), leaf(4, 4), leaf(4)]
    given = x if inputs else x.detach()

    def outputs() -> tuple[list[Any], list[Tensor]]:
        ys = [y for y in f(given, w) if y.requires_grad]
        torch.manual_seed(1)
        return [get_gradient_edge(y) for y in ys], [torch.randn_like(y) for y in ys]

    edges, cotangents = outputs()
    torch.autograd.backward(edges, cotangents, inputs=[*w, *([x] if inputs else [])])
    want = [t.grad for t in (*w, x)]
    for t in (*w, x):
        t.grad = None

    edges, cotangents = outputs()
    found, weight_half = backward_halves(edges, cotangents, [x] if inputs else [], w)
    assert all(t.grad is None for t in (*w, x)), "the first half adds nothing to the weights"
    weight_half()
    got = [*(t.grad for t in w), *(found or [None])]
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_gradients_add_up_over_microbatches() -> None:
    w = [leaf(4, 4), leaf(4, 4), leaf(4)]
    total = [torch.zeros_like(t) for t in w]
    halves = []
    for _ in range(3):
        x = leaf(5, 4)
        y = own_function(x, w)[0]
        total = [t + g for t, g in zip(total, torch.autograd.grad(y.sum(), w, retain_graph=True), strict=True)]
        halves.append(backward_halves([get_gradient_edge(y)], [torch.ones_like(y)], [x], w)[1])
    for half in halves:
        half()
    assert all(torch.equal(t.grad, s) for t, s in zip(w, total, strict=True))


class Matmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_each_half_costs_one_forward() -> None:
    """Four linear maps: 4 matmuls forward, 4 for the input's gradient, 4 for the weights'; not one is computed twice."""
    x, w = leaf(5, 4), [leaf(4, 4) for _ in range(4)]
    with Matmuls() as forward:
        y = x
        for weight in w:
            y = torch.tanh(fstep.linear(y, weight))
    with Matmuls() as first:
        _, weight_half = backward_halves([get_gradient_edge(y)], [torch.ones_like(y)], [x], w)
    with Matmuls() as second:
        weight_half()
    assert (forward.count, first.count, second.count) == (4, 4, 4)


def test_the_engine_is_where_it_was() -> None:
    """A private name of torch. Should it go: start the engine another way in grad/engine.py, and only there."""
    assert callable(torch.autograd.graph._engine_run_backward)
    x, w = leaf(3, 4), leaf(4)
    y = get_gradient_edge(Scale.apply(x, w))  # type: ignore[no-untyped-call]
    assert from_function(y)
    ones = torch.ones(3, 4, dtype=torch.float64)
    assert torch.equal(run_engine([y], [ones], [x], accumulate=False)[0], w.detach().expand(3, 4))
    assert x.grad is None
    run_engine([y], [ones], [x, w], accumulate=True)
    assert torch.equal(w.grad, x.detach().sum(0))


class Token:
    """Something that a graph holds on to."""


class Hold(torch.autograd.Function):
    """The identity, with a token in its context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


def test_nothing_is_left_after_the_second_half() -> None:
    x, w = leaf(5, 4), [leaf(4, 4), leaf(4, 4), leaf(4)]
    token = Token()
    seen = weakref.ref(token)
    gc.disable()
    try:
        y = mlp(Hold.apply(mlp(x, w)[0], token), w)[0]  # type: ignore[no-untyped-call]
        del token
        _, weight_half = backward_halves([get_gradient_edge(y)], [torch.ones_like(y)], [x], w)
        del y
        assert seen() is not None
        weight_half()
        assert seen() is None, "the graph is kept alive, without the garbage collector"
    finally:
        gc.enable()


def directly_and_through_itself(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [x @ w[0] @ w[0] @ w[0].T]


def through_one_operation(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [torch.nn.functional.layer_norm(x @ w[0], (5,), 1 + w[2], w[2])]


def added_to_its_own_product(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [x @ w[0] @ w[0] + w[0][0]]


def in_a_function_twice(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    return [torch.addcmul(x, torch.tanh(w[2]), w[2]) @ w[1]]


@pytest.mark.parametrize(
    "f", [directly_and_through_itself, through_one_operation, added_to_its_own_product, in_a_function_twice]
)
def test_a_weight_reached_directly_and_through_something_made_of_it(f: Callable) -> None:
    torch.manual_seed(0)
    x, w = leaf(3, 5), [leaf(5, 5), leaf(5, 5), leaf(5)]
    (y,) = f(x, w)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, [x, *w], g, allow_unused=True)
    (y,) = f(x, w)
    grads, second = backward_halves([get_gradient_edge(y)], [g], [x], w)
    second()
    for got, expected in zip([*grads, *(p.grad for p in w)], want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
