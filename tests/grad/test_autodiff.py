"""value_and_grad and vjp beside torch.func, over a grid of signatures and nestings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fstep.grad.autodiff import split_trainable, value_and_grad, vjp
from fstep.ratio import Ratio
from fstep.tree import tree_leaves, tree_map, tree_merge


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Same structure, same leaves (None included); to the bit unless a tolerance is given."""
    spec = torch.utils._pytree.tree_structure
    assert spec(got) == spec(expected), (got, expected)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def loss(params: Any, x: Tensor, scale: float = 1.0, *, shift: Tensor | float = 0.0) -> Tensor:
    """A function with a nested tree, a leaf it does not use, and non-zero second derivatives."""
    h = torch.tanh(x @ params["layers"][0]["w"] + params["b"] + shift)
    return scale * (h @ params["layers"][1]["w"]).square().sum()


def params() -> Any:
    return {"b": randn(4), "layers": ({"w": randn(3, 4)}, {"w": randn(4, 2)}), "unused": randn(2)}


# Signatures ----------------------------------------------------------------------------------------------------------

CALLS = {"plain": ((), {}), "positional": ((2.0,), {}), "keyword": ((), {"scale": 3.0, "shift": torch.ones(())})}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("argnums", [0, 1, (0,), (0, 1), (1, 0)])
def test_equals_torch_func(argnums: Any, has_aux: bool, call: str) -> None:
    args, kwargs = CALLS[call]
    p, x = params(), randn(5, 3)

    def f(*args: Any, **kwargs: Any) -> Any:
        value = loss(*args, **kwargs)
        return (value, {"twice": 2 * value, "x": (args[1].sum(),)}) if has_aux else value

    grads, value = torch.func.grad_and_value(f, argnums, has_aux)(p, x, *args, **kwargs)
    close(value_and_grad(f, argnums, has_aux)(p, x, *args, **kwargs), (value, grads))


@pytest.mark.parametrize(("argnums", "same"), [(-1, 1), ((0, -1), (0, 1)), (-2, 0)])
def test_argnums_count_from_the_end(argnums: Any, same: Any) -> None:
    p, x = params(), randn(5, 3)
    close(value_and_grad(loss, argnums)(p, x), value_and_grad(loss, same)(p, x))


def test_unused_leaves_have_zeros_and_others_none() -> None:
    p = {"w": randn(3), "unused": randn(2), "step": torch.tensor(3), "name": "w", "none": None}
    value, grads = value_and_grad(lambda p: (p["w"] * p["step"]).sum())(p)
    assert value == (p["w"] * 3).sum()
    expected = {"w": torch.full((3,), 3.0), "unused": torch.zeros(2), "step": None, "name": None, "none": None}
    assert grads.keys() == expected.keys()
    for name, want in expected.items():
        assert (grads[name] is None) if want is None else torch.equal(grads[name], want.double())
    _, grads = value_and_grad(lambda p: torch.tensor(1.0))(p)
    assert torch.equal(grads["w"], torch.zeros(3, dtype=torch.float64)) and not grads["w"].requires_grad


def test_of_a_ratio_the_sum_is_differentiated() -> None:
    w = randn(3)
    value, grad = value_and_grad(lambda w: Ratio(w.square().sum(), w.abs().sum()))(w)
    assert isinstance(value, Ratio) and not value.num.requires_grad and not value.den.requires_grad
    assert value.num == w.square().sum() and value.den == w.abs().sum()
    assert torch.equal(grad, 2 * w)
    (value, aux), _ = value_and_grad(lambda w: (Ratio(w.sum(), w.sum()), Ratio(w.sum(), w.sum())), has_aux=True)(w)
    assert isinstance(value, Ratio) and isinstance(aux, Ratio) and not aux.num.requires_grad


def test_aux_may_be_anything() -> None:
    (_, aux), _ = value_and_grad(lambda w: (w.sum(), {"n": 3, "s": "text", "w": w}), has_aux=True)(randn(2))
    assert aux["n"] == 3 and aux["s"] == "text" and not aux["w"].requires_grad
    _, _pull, aux = vjp(lambda w: (w.square(), {"n": 3, "w": 5 * w}), randn(2), has_aux=True)
    assert aux["n"] == 3 and not aux["w"].requires_grad


def test_aux_inside_torch_func_belongs_to_the_outer_transform() -> None:
    def f(w: Tensor) -> Tensor:
        def g(w: Tensor) -> Any:
            return w.square().sum(), {"n": 3, "w": 5 * w}

        (value, first), _ = value_and_grad(g, has_aux=True)(w)
        value2, _, second = vjp(g, w, has_aux=True)
        assert first["n"] == second["n"] == 3
        # One wrapper each, the outer transform's: the inner one has ended.
        assert [repr(x).count("TrackingTensor") for x in (value, value2, first["w"], second["w"])] == [1] * 4
        return first["w"].sum() + second["w"].sum()

    assert torch.func.grad(f)(randn(2)).tolist() == [10.0, 10.0]


def test_complex_leaves() -> None:
    z = torch.randn(3, dtype=torch.complex128)
    _, grad = value_and_grad(lambda z: (z * z.conj()).real.sum())(z)
    torch.testing.assert_close(grad, 2 * z)


# Purity --------------------------------------------------------------------------------------------------------------


def test_parameters_and_modules_are_not_touched() -> None:
    module = nn.Linear(3, 1)
    own = dict(module.named_parameters())
    before = {k: (v.detach().clone(), v._version) for k, v in own.items()}
    for p in own.values():
        p.grad = torch.full_like(p, 7.0)
    x = torch.randn(2, 3)
    _, grads = value_and_grad(lambda p: torch.func.functional_call(module, p, x).sum())(own)
    for k, p in own.items():
        assert torch.equal(p.grad, torch.full_like(p, 7.0)) and torch.equal(p, before[k][0])
        assert p.requires_grad and p.grad_fn is None and p._version == before[k][1]
    torch.testing.assert_close(grads["weight"], x.sum(0, keepdim=True))


def test_plain_values_stay_plain() -> None:
    w = randn(3)
    value, grad = value_and_grad(lambda w: w.square().sum())(w)
    assert not w.requires_grad and not value.requires_grad and not grad.requires_grad
    y, pull = vjp(lambda w: w.square(), w)
    assert not y.requires_grad and not pull(y)[0].requires_grad and not w.requires_grad


def test_inside_no_grad() -> None:
    p, x = params(), randn(5, 3)
    expected = value_and_grad(loss)(p, x)
    with torch.no_grad():
        got = value_and_grad(loss)(p, x)
        _, pull = vjp(lambda x: x.square(), x)
        assert not torch.is_grad_enabled()
        close(pull(x)[0], 2 * x * x, 1e-14)
        asked = x.clone().requires_grad_()  # no_grad is the caller's word that nothing is recorded
        assert not value_and_grad(loss, 1)(p, asked)[1].requires_grad
    close(got, expected)


def test_inference_mode_is_refused() -> None:
    """torch records nothing there, and every gradient would be zero."""
    w = randn(2)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"value_and_grad: torch.inference_mode allows no gradients; use torch.no_gr"):
            value_and_grad(lambda w: w.square().sum())(w)
        with pytest.raises(RuntimeError, match=r"vjp: torch.inference_mode allows no gradients"):
            vjp(lambda w: w.square(), w)


# Nesting -------------------------------------------------------------------------------------------------------------


def grad_norm(f: Callable, take: Callable = value_and_grad) -> Callable:
    return lambda p, x: sum(g.square().sum() for g in tree_leaves(take(f)(p, x)[1]))


def func_grad_norm(f: Callable) -> Callable:
    return lambda p, x: sum(g.square().sum() for g in tree_leaves(torch.func.grad(f)(p, x)))


def test_of_itself() -> None:
    p, x = params(), randn(5, 3)
    grads, value = torch.func.grad_and_value(func_grad_norm(loss))(p, x)
    close(value_and_grad(grad_norm(loss))(p, x), (value, grads), 1e-12)
    third = torch.func.grad_and_value(func_grad_norm(func_grad_norm(loss)))(p, x)[::-1]
    close(value_and_grad(grad_norm(grad_norm(loss)))(p, x), third, 1e-10)


# Forward mode makes torch load decompositions of its own through the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_under_torch_func() -> None:
    p, xs = params(), randn(4, 5, 3)
    x, w = xs[0], p["b"]

    def of(take: Callable) -> Callable:
        return lambda w, x: take(loss)({**p, "b": w}, x)[1]["b"]

    def func_take(f: Callable) -> Callable:
        return lambda *args: torch.func.grad_and_value(f)(*args)[::-1]

    mine, theirs = of(value_and_grad), of(func_take)
    for transform in (
        lambda f: torch.func.grad(lambda *a: f(*a).square().sum())(w, x),
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(w, xs),
        lambda f: torch.func.jacrev(f)(w, x),
        lambda f: torch.func.jvp(lambda w: f(w, x), (w,), (torch.ones_like(w),)),
        lambda f: torch.func.hessian(lambda w: f(w, x).square().sum())(w),
        lambda f: torch.func.vmap(torch.func.grad(lambda *a: f(*a).square().sum()), in_dims=(None, 0))(w, xs),
    ):
        close(transform(mine), transform(theirs), 1e-11)


def test_under_torch_autograd() -> None:
    """Called on values that require a gradient it records, and not otherwise."""
    p, x = params(), randn(5, 3).requires_grad_()
    value, grads = value_and_grad(loss)(p, x)
    assert value.requires_grad and grads["b"].requires_grad and not p["b"].requires_grad
    (got,) = torch.autograd.grad(value + sum(g.square().sum() for g in tree_leaves(grads)), x)
    expected = torch.func.grad(lambda x: loss(p, x) + func_grad_norm(loss)(p, x))(x.detach())
    close(got, expected, 1e-12)
    y, pull = vjp(lambda w, x: w * x, randn(5, 3), x)
    assert y.requires_grad and pull(torch.ones_like(y))[0].requires_grad


def test_a_closure_is_a_constant() -> None:
    """What should be differentiated through is an argument; a value closed over has no gradient."""
    c = torch.tensor(3.0, requires_grad=True)
    assert not value_and_grad(lambda w: c * w.sum())(torch.ones(2))[1].requires_grad
    assert value_and_grad(lambda w, c: c * w.sum())(torch.ones(2), c)[1].requires_grad
    assert value_and_grad(lambda w, c: c * w.sum())(torch.ones(2), c=c)[1].requires_grad


def test_hessian_vector_product_of_a_quadratic() -> None:
    a = randn(4, 4)
    w, v = randn(4), randn(4)

    def f(w: Tensor) -> Tensor:
        return w @ a @ w + w.pow(3).sum()

    _, hvp = value_and_grad(lambda w: value_and_grad(f)(w)[1] @ v)(w)
    torch.testing.assert_close(hvp, (a + a.T) @ v + 6 * w * v, rtol=1e-12, atol=1e-12)
    _, pull = vjp(lambda w: value_and_grad(f)(w)[1], w)
    torch.testing.assert_close(pull(v)[0], hvp, rtol=1e-12, atol=1e-12)
    _, pull = torch.func.vjp(lambda w: value_and_grad(f)(w)[1], w)
    torch.testing.assert_close(pull(v)[0], hvp, rtol=1e-12, atol=1e-12)


def test_checkpointed_and_compiled_functions_inside() -> None:
    """The two things that torch.func refuses or silently runs eagerly."""
    p, x = params(), randn(5, 3)
    expected = value_and_grad(loss)(p, x)
    runs = []

    def counted(p: Any, x: Tensor) -> Tensor:
        runs.append(1)
        return loss(p, x)

    close(value_and_grad(lambda p, x: checkpoint(counted, p, x, use_reentrant=False))(p, x), expected)
    assert len(runs) == 2
    frames = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    close(value_and_grad(torch.compile(loss, backend=backend, fullgraph=True))(p, x), expected)
    assert len(frames) == 1
    torch._dynamo.reset()


# Trainable or frozen -------------------------------------------------------------------------------------------------


def test_trainable() -> None:
    p, x = params(), randn(5, 3)
    _, everything = value_and_grad(loss)(p, x)
    _, grads = value_and_grad(loss, trainable=lambda path: path.startswith("layers.1"))(p, x)
    assert grads["b"] is None and grads["unused"] is None and grads["layers"][0]["w"] is None
    assert torch.equal(grads["layers"][1]["w"], everything["layers"][1]["w"])
    _, both = value_and_grad(loss, (0, 1), trainable=lambda path: path in ("b", ""))(p, x)
    assert both[0]["unused"] is None and torch.equal(both[0]["b"], everything["b"]) and both[1].shape == x.shape


def test_split_trainable_and_merge() -> None:
    p = params() | {"step": torch.tensor(1), "none": None}
    seen: list[str] = []
    pick, rest = split_trainable(p, lambda path: seen.append(path) or path == "b")
    assert seen == ["b", "layers.0.w", "layers.1.w", "step", "unused"]
    assert [x is y for x, y in zip(tree_leaves(pick), [p["b"]], strict=True)] == [True]
    assert all(x is y for x, y in zip(tree_leaves(tree_merge(pick, rest)), tree_leaves(p), strict=True))
    pick, rest = split_trainable(p)
    assert pick["step"] is None and tree_leaves(rest) == [p["step"]]


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("take", "error", "message"),
    [
        (lambda p: value_and_grad(lambda p: p["w"])(p), ValueError, r"value_and_grad: .* shape \(3,\); sum it to a 0-d"),
        (lambda p: value_and_grad(lambda p: 3.0)(p), TypeError, "value_and_grad: the function returned a float; return a"),
        (lambda p: value_and_grad(lambda p: None)(p), TypeError, "value_and_grad: the function returned a NoneType"),
        (lambda p: value_and_grad(lambda p: Ratio(1.0, 2.0))(p), TypeError, "returned a Ratio of float; .* a Ratio of two"),
        (lambda p: value_and_grad(lambda p: Ratio(p["w"], 1))(p), ValueError, r"returned shape \(3,\)"),
        (lambda p: value_and_grad(lambda p: p["w"].sum(), has_aux=True)(p), TypeError, r"must return \(value, aux\)"),
        (lambda p: value_and_grad(lambda p: p["w"].sum(), 1)(p), ValueError, "argnums 1, but .* with 1 positional"),
        (lambda p: value_and_grad(lambda p: p["w"].sum(), -2)(p), ValueError, "argnums -2, but .* with 1 positional"),
        (lambda p: value_and_grad(lambda p: p["w"].sum())(p=p), ValueError, "argnums 0, but .* with 0 positional"),
        (lambda p: value_and_grad(lambda p: p["w"].sum(), ())(p), ValueError, "value_and_grad: argnums is empty"),
        (
            lambda p: value_and_grad(lambda p: p["w"].sum(), (0, -1))(p),
            ValueError,
            r"argnums \(0, -1\) names an argument tw",
        ),
        (
            lambda p: value_and_grad(lambda p: p["w"].sum(), trainable=lambda path: False)(p),
            ValueError,
            r"none of the 2 leaves is trainable; paths look like \['n', 'w'\], and `trainable` must be true for at least",
        ),
        (
            lambda p: value_and_grad(lambda p: p["w"].sum(), trainable=lambda path: True)(p),
            TypeError,
            "the predicate chose 'n', a torch.int64, which can have no gradient; let it choose floating-point tensors",
        ),
        (lambda p: value_and_grad(lambda p: 1.0)({}), ValueError, "none of 0 leaves is a floating-point tensor"),
        (lambda p: value_and_grad(lambda n: 1.0)(p["n"]), ValueError, "none of 1 leaves .* close over the rest"),
        (lambda p: vjp(lambda: 1.0), ValueError, r"vjp: no primals given; pass the arguments to differentiate, vjp\(f, x\)"),
        (lambda p: vjp(lambda p, n: p["w"][n], p, p["n"]), ValueError, "none of 1 leaves is a floating-point tensor"),
    ],
)
def test_errors(take: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        take({"w": randn(3), "n": torch.tensor(2)})


# vjp -----------------------------------------------------------------------------------------------------------------


def model(p: Any, x: Tensor) -> Any:
    h = torch.tanh(x @ p["layers"][0]["w"] + p["b"])
    return {"y": h @ p["layers"][1]["w"], "h": (h.sum(),), "constant": torch.ones(2, dtype=torch.float64)}


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_vjp_equals_torch_func(both: bool, has_aux: bool) -> None:
    p, x = params(), randn(5, 3)
    primals = (p, x) if both else (p,)

    def f(p: Any, given: Tensor = x) -> Any:
        out = model(p, given)
        return (out, {"aux": 2 * out["y"]}) if has_aux else out

    got, pull, *aux = vjp(f, *primals, has_aux=has_aux)
    expected, func_pull, *func_aux = torch.func.vjp(f, *primals, has_aux=has_aux)
    close(got, expected)
    close(aux, func_aux)
    for _ in range(2):  # the graph is kept
        cotangents = tree_map(torch.randn_like, expected)
        close(pull(cotangents), func_pull(cotangents), 1e-13)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("has_aux", [False, True])
def test_vjp_under_torch_func(has_aux: bool) -> None:
    p, xs = params(), randn(4, 5, 3)

    def pulled(take: Callable) -> Callable:
        def run(w: Tensor, x: Tensor) -> Tensor:
            def f(w: Tensor) -> Any:
                y = model({**p, "b": w}, x)["y"]
                return (y, {"n": 3, "y": y.sum()} if take is vjp else y.sum()) if has_aux else y

            y, pull, *aux = take(f, w, has_aux=has_aux)
            extra = (aux[0]["y"] if take is vjp else aux[0]) if has_aux else 0
            return pull(y)[0].square().sum() + extra

        return run

    w, x = p["b"], xs[0]
    for transform in (
        lambda f: torch.func.grad(f)(w, x),
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(w, xs),
        lambda f: torch.func.jvp(lambda w: f(w, x), (w,), (torch.ones_like(w),)),
    ):
        close(transform(pulled(vjp)), transform(pulled(torch.func.vjp)), 1e-11)


def test_two_phases_equal_one() -> None:
    """A foreign loss sees the output and returns its gradient, which is pulled back."""
    p, x = params(), randn(5, 3)
    out, pull = vjp(lambda p: model(p, x)["y"], p)
    cotangent = 2 * out  # of out.square().sum()
    _, expected = value_and_grad(lambda p: model(p, x)["y"].square().sum())(p)
    close(pull(cotangent)[0], expected, 1e-13)


def test_vjp_of_nothing() -> None:
    w = randn(3)
    y, pull = vjp(lambda w: torch.ones(2), w)
    assert torch.equal(pull(y)[0], torch.zeros(3, dtype=torch.float64))
    y, pull = vjp(lambda w: w, w)
    assert torch.equal(y, w) and torch.equal(pull(torch.ones_like(w))[0], torch.ones_like(w))


def test_cotangents_that_require_grad_are_recorded() -> None:
    _, pull = vjp(lambda w: w.square(), randn(3))
    c = randn(3).requires_grad_()
    (grad,) = pull(c)
    assert grad.requires_grad
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), c)[0], pull(torch.ones(3, dtype=torch.float64))[0])


@pytest.mark.parametrize(
    "bad", [lambda y: {"y": y["y"]}, lambda y: y["y"], lambda y: {**y, "y": y["y"][:1]}, lambda y: [*y]]
)
def test_cotangents_have_to_look_like_the_output(bad: Callable) -> None:
    y, pull = vjp(lambda w: {"x": w.sum(), "y": w.square()}, randn(3))
    y = {k: v.detach() for k, v in y.items()}
    with pytest.raises(ValueError, match=r"vjp: cotangents have shapes .* the output has .*; pass a tree like the output"):
        pull(tree_map(lambda x: x if isinstance(x, Tensor) else torch.ones(()), bad(y)))


def test_vjp_of_an_output_with_more_than_tensors() -> None:
    out, pull = vjp(lambda x: {"y": 2 * x, "n": 3, "name": "a"}, torch.tensor([1.0, 2.0]))
    assert out["n"] == 3 and out["y"].tolist() == [2.0, 4.0]
    (g,) = pull({"y": torch.tensor([1.0, 10.0]), "n": 3, "name": "a"})
    assert g.tolist() == [2.0, 20.0]
