"""Gradients as values: `value_and_grad` and `vjp` with torch.func's signatures, on torch.autograd underneath.

Why not torch.func itself: in eager mode it costs about twice the dispatch time, refuses activation checkpointing and
saved-tensor hooks, and silently runs a compiled function eagerly. Here the arguments become private detached leaves, the
function runs once, and `torch.autograd.grad` reads the gradients off. Nobody's ``.grad`` is touched.

    f(params, batch)  ->  leaves = params, detached  ->  f(leaves, batch)  ->  autograd.grad  ->  (value, grads)

Around another derivative nothing is detached: called on values that require a gradient, the result can be differentiated
again; inside a torch.func transform the work is handed to torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fstep.grad.engine import from_function, run_engine
from fstep.ratio import Ratio
from fstep.trace import in_transform, is_recording
from fstep.tree import check_callable, tree_leaves, tree_map, tree_merge, tree_paths, tree_replace_leaves

Predicate = Callable[[str], bool]


def split_trainable(params: Any, trainable: Predicate | None = None, *, none_is_fine: bool = False) -> tuple[Any, Any]:
    """Split a tree in two of the same structure: what a predicate on the paths calls trainable, and the rest.

    Each has ``None`` where the other has the leaf; `tree_merge` puts them together again. Without a predicate every
    floating-point leaf is trainable. To choose none is an error unless ``none_is_fine``, as it is for a pipeline stage that
    happens to be frozen.

    >>> import torch, fstep
    >>> params = {"base": torch.ones(1), "lora": torch.zeros(1)}
    >>> fstep.split_trainable(params, lambda path: "lora" in path)
    ({'base': None, 'lora': tensor([0.])}, {'base': tensor([1.]), 'lora': None})
    """
    leaves = tree_leaves(params)
    chosen = choose_trainable(params, trainable, none_is_fine=none_is_fine, leaves=leaves)
    pick = [leaf if mine else None for leaf, mine in zip(leaves, chosen, strict=True)]
    rest = [None if mine else leaf for leaf, mine in zip(leaves, chosen, strict=True)]
    return tree_replace_leaves(params, pick), tree_replace_leaves(params, rest)


def check_choice(function: str, params: Any, trainable: Any) -> None:
    """Refuse a module for params, and a predicate that cannot be asked."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{function}: params is a {type(params).__name__}, a module; make params of it with fstep.lift")
    if trainable is not None:
        check_callable(function, "trainable", trainable)


def choose_trainable(
    params: Any, trainable: Predicate | None, *, none_is_fine: bool = False, leaves: Sequence[Any] | None = None
) -> list[bool]:
    """Say of each leaf whether it is trained; raises as `split_trainable` does. ``leaves`` are those, if they are known."""
    check_choice("split_trainable", params, trainable)
    leaves = tree_leaves(params) if leaves is None else leaves
    able = [isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves]
    if trainable is None:
        if not any(able) and not none_is_fine:
            raise ValueError(
                f"split_trainable: none of {len(leaves)} leaves is a floating-point tensor, so there is nothing to "
                "differentiate; pass a tree of parameters, and let the function close over the rest"
            )
        return able
    paths = tree_paths(params)
    chosen = [bool(trainable(path)) for path in paths]
    for path, leaf, mine, fits in zip(paths, leaves, chosen, able, strict=True):
        if mine and not fits:
            raise TypeError(
                f"split_trainable: the predicate chose {path!r}, a {getattr(leaf, 'dtype', type(leaf).__name__)}, which can "
                "have no gradient; let it choose floating-point tensors only"
            )
    if not any(chosen) and not none_is_fine:
        raise ValueError(
            f"split_trainable: none of the {len(chosen)} leaves is trainable; paths look like {sorted(paths)[:4]}, and "
            "`trainable` must be true for at least one"
        )
    return chosen


def refuse_inference_mode(function: str) -> None:
    """Raise where torch records nothing, and every gradient would silently be zero."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{function}: torch.inference_mode allows no gradients; use torch.no_grad around this call")


def objective(function: str, value: Any) -> Tensor:
    """Return the scalar to differentiate: of a Ratio, its sum."""
    scalar = value.num if isinstance(value, Ratio) else value
    if not isinstance(scalar, Tensor):
        what = type(value).__name__ if scalar is value else f"{type(value).__name__} of {type(scalar).__name__}"
        raise TypeError(
            f"{function}: the function returned a {what}; return a 0-d tensor or a Ratio of two, and with has_aux=True a "
            "pair of that and anything else"
        )
    if scalar.dim() != 0:
        raise ValueError(f"{function}: the function returned shape {tuple(scalar.shape)}; sum it to a 0-d tensor")
    return scalar


def detach(tree: Any) -> Any:
    """Cut every tensor of a tree off from any graph."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def private_leaf(x: Tensor, recording: bool) -> Tensor:
    """Return ``x`` as a place of its own in a graph: gradients with respect to it are nobody else's."""
    if recording and x.requires_grad:
        return x.view_as(x)
    return x.detach().requires_grad_()


def backward_into(outputs: Sequence[Tensor | GradientEdge], cotangents: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Add the gradients of ``outputs`` to the ``.grad`` of private ``leaves``.

    The one place that uses torch's accumulation: the leaves are private, so from outside it is as pure as
    `torch.autograd.grad`, and it needs no second set of gradients to add up microbatches.
    """
    kept = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if isinstance(y, GradientEdge) or y.requires_grad]
    if not kept or not leaves:
        return
    if any(from_function(y) for y, _ in kept):
        run_engine([y for y, _ in kept], [c for _, c in kept], leaves, accumulate=True)
    else:
        torch.autograd.backward([y for y, _ in kept], [c for _, c in kept], inputs=list(leaves))  # type: ignore[arg-type]


def read_grads(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return what `backward_into` has accumulated; zeros where nothing depended on a leaf."""
    return [torch.zeros_like(x, requires_grad=False) if x.grad is None else x.grad for x in leaves]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    named = zip(tree_paths(tree), tree_leaves(tree), strict=True)
    return {path: tuple(x.shape) for path, x in named if isinstance(x, Tensor)}


def _tensor_aux(call: Callable[..., tuple[Any, Any]], seen: list[Any]) -> Callable[..., tuple[Any, list[Tensor]]]:
    """Let ``call`` return any auxiliary tree under torch.func, which takes tensors only: the tree goes to ``seen``."""

    def tensors_only(*leaves: Tensor) -> tuple[Any, list[Tensor]]:
        out, aux = call(*leaves)
        seen[:] = [aux]
        return out, [x for x in tree_leaves(aux) if isinstance(x, Tensor)]

    return tensors_only


def _restore(seen: list[Any], tensors: Sequence[Tensor]) -> Any:
    """Put the tensors that torch.func returned into the tree they came from."""
    new = iter(tensors)
    return tree_map(lambda x: next(new) if isinstance(x, Tensor) else x, seen[0])


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    trainable: Predicate | None = None,
) -> Callable[..., Any]:
    """Return a function that computes ``f`` and the gradient of its result.

    ``value_and_grad(f)(*args, **kwargs)`` returns ``(value, grads)``, or ``((value, aux), grads)`` if ``has_aux`` and f
    returns ``(value, aux)``; that is `torch.func.grad_and_value` with the pair turned round. The value is a 0-d tensor,
    or a `Ratio`, of which the sum ``num`` is differentiated. ``grads`` has the structure of argument ``argnums`` (a tuple
    of them if ``argnums`` is one). A leaf that f does not use has gradient zero; a leaf that is not floating-point, or
    that ``trainable(path)`` refuses, has ``None``.

    Raises TypeError or ValueError if f does not return a scalar, ValueError if ``argnums`` or ``trainable`` choose nothing,
    TypeError if they choose a leaf that is not floating-point, and RuntimeError inside `torch.inference_mode`.

    >>> import torch, fstep
    >>> f = lambda params, x: (params["w"] * x).sum() ** 2
    >>> fstep.value_and_grad(f)({"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0]))
    (tensor(121.), {'w': tensor([66., 88.])})
    """
    check_callable("value_and_grad", "f", f)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers:
        raise ValueError("value_and_grad: argnums is empty; pass the number of at least one argument")

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for n in numbers:
            if not -len(args) <= n < len(args):
                raise ValueError(
                    f"value_and_grad: argnums {n}, but the function was called with {len(args)} positional arguments"
                )
        if len({n % len(args) for n in numbers}) < len(numbers):
            raise ValueError(f"value_and_grad: argnums {numbers} names an argument twice; name each once")
        pairs = [split_trainable(args[n], trainable) for n in numbers]
        picked = tuple(pick for pick, _ in pairs)

        def call(*leaves: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
            full = list(args)
            for n, pick, (_, rest) in zip(numbers, tree_replace_leaves(picked, leaves), pairs, strict=True):
                full[n] = tree_merge(pick, rest)
            out = f(*full, **kwargs)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError("value_and_grad: with has_aux=True the function must return (value, aux)")
            value, aux = out if has_aux else (out, None)
            return objective("value_and_grad", value), (value, aux)

        values = tree_leaves(picked)
        if in_transform():
            seen: list[Any] = []
            take = torch.func.grad_and_value(_tensor_aux(call, seen), tuple(range(len(values))), has_aux=True)
            flat, (_, tensors) = take(*values)
            value, aux = _restore(seen, tensors)
        else:
            refuse_inference_mode("value_and_grad")
            recording = is_recording(args, kwargs)
            with torch.enable_grad():
                leaves = [private_leaf(x, recording) for x in values]
                scalar, (value, aux) = call(*leaves)
                if scalar.requires_grad:
                    flat = torch.autograd.grad(
                        scalar, leaves, create_graph=recording, allow_unused=True, materialize_grads=True
                    )
                else:
                    flat = tuple(torch.zeros_like(x, requires_grad=False) for x in leaves)
            if not recording:
                value, aux = detach(value), detach(aux)
        grads = tree_replace_leaves(picked, flat)
        return ((value, aux) if has_aux else value), (grads[0] if isinstance(argnums, int) else grads)

    return wrapped


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Compute ``f(*primals)`` and a function that pulls cotangents of the output back to the primals.

    Returns ``(output, vjp_fn)``, or ``(output, vjp_fn, aux)`` if ``has_aux``, like `torch.func.vjp`. ``vjp_fn(cotangents)``
    takes a tree like the output and returns a tuple, one tree for each primal. It may be called again; the graph lives as
    long as ``vjp_fn`` does. This is the two-phase form: run the model, let somebody else's loss look at the output, and
    pull back the gradient it returns.

    Raises ValueError for a primal without a floating-point leaf, and for cotangents that are not like the output.

    >>> import torch, fstep
    >>> y, pull = fstep.vjp(lambda x: x**2, torch.tensor([1.0, 3.0]))
    >>> y, pull(torch.tensor([1.0, 10.0]))
    (tensor([1., 9.]), (tensor([ 2., 60.]),))
    """
    check_callable("vjp", "f", f)
    if not primals:
        raise ValueError("vjp: no primals given; pass the arguments to differentiate, vjp(f, x)")
    pairs = [split_trainable(p) for p in primals]
    picked = tuple(pick for pick, _ in pairs)

    def call(*leaves: Tensor) -> Any:
        new = tree_replace_leaves(picked, leaves)
        return f(*[tree_merge(pick, rest) for pick, (_, rest) in zip(new, pairs, strict=True)])

    values = tree_leaves(picked)
    if in_transform():
        seen: list[Any] = []
        both = call if has_aux else lambda *leaves: (call(*leaves), ())
        output, pull_leaves, kept = torch.func.vjp(  # type: ignore[misc]
            _tensor_aux(both, seen), *values, has_aux=True
        )
        inner = (lambda cotangents: tree_replace_leaves(picked, pull_leaves(cotangents)),)
        return (output, *inner, _restore(seen, kept)) if has_aux else (output, *inner)

    refuse_inference_mode("vjp")
    recording = is_recording(primals)
    with torch.enable_grad():
        leaves = [private_leaf(x, recording) for x in values]
        out = call(*leaves)
    output, aux = out if has_aux else (out, None)
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    def pull(cotangents: Any) -> Any:
        given = [x for x in tree_leaves(cotangents) if isinstance(x, Tensor)]
        if (got := _shapes(cotangents)) != (want := _shapes(output)):
            raise ValueError(f"vjp: cotangents have shapes {got}, the output has {want}; pass a tree like the output")
        graph = [(t, c) for t, c in zip(tensors, given, strict=True) if t.requires_grad]
        again = recording or is_recording(cotangents)
        if not graph:
            return tree_replace_leaves(picked, [torch.zeros_like(x, requires_grad=False) for x in leaves])
        flat = torch.autograd.grad(
            [t for t, _ in graph],
            leaves,
            [c for _, c in graph],
            retain_graph=True,
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
        return tree_replace_leaves(picked, flat)

    shown = output if recording else detach(output)
    return (shown, pull, aux if recording else detach(aux)) if has_aux else (shown, pull)
