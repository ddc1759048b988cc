"""Helpers for tests of steps and transforms: two trees are close, and a function changes nothing.

    assert_trees_close(actual, expected)   each leaf a vector:  |actual - expected| <= atol + rtol |expected|
    assert_pure(f, *args)                  run f, and look whether the arguments are still what they were

Each says which leaf, by its path, and by how much. Import them from ``fstep.testing``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fstep.tree import tree_leaves, tree_paths

P = ParamSpec("P")
R = TypeVar("R")


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 0.0) -> None:
    """Fail unless two trees have the same leaves, up to rounding.

    Each leaf is compared as one vector, ``|actual - expected| <= atol + rtol * |expected|`` in the Euclidean norm: an
    element that cancelled to nearly 0 has no relative accuracy of its own. Paths, shapes and dtypes have to be equal, and
    so do infinities, NaNs and whatever is no floating-point tensor. The default ``rtol`` is meant for float64; ``rtol=0``
    asks for equal values.

    Raises AssertionError naming the leaf that is furthest off, both norms and the relative error.

    >>> import torch, fstep.testing
    >>> w = torch.ones(2, dtype=torch.float64)
    >>> fstep.testing.assert_trees_close({"w": w + 1e-15}, {"w": w})
    >>> fstep.testing.assert_trees_close({"w": w * 2}, {"w": w})
    Traceback (most recent call last):
        ...
    AssertionError: assert_trees_close: 'w' is off by 1.0e+00, rtol=1e-10, atol=0; |actual| 2.82843, |expected| 1.41421
    """
    paths, others = tree_paths(actual), tree_paths(expected)
    if paths != others:
        missing, extra = [p for p in others if p not in set(paths)], [p for p in paths if p not in set(others)]
        raise AssertionError(
            f"assert_trees_close: actual has no leaf {missing[:4]} that expected has, and has {extra[:4]} more"
        )
    worst: tuple[float, str] | None = None
    for path, a, e in zip(paths, tree_leaves(actual), tree_leaves(expected), strict=True):
        failure = _compare(path, a, e, rtol, atol)
        if failure is not None and (worst is None or failure[0] > worst[0]):
            worst = failure
    if worst is not None:
        raise AssertionError(f"assert_trees_close: {worst[1]}")


def _compare(path: str, a: Any, e: Any, rtol: float, atol: float) -> tuple[float, str] | None:
    """Return how bad a difference is, and what to say about it; ``None`` if there is none."""
    inf = float("inf")
    if not (isinstance(a, Tensor) and isinstance(e, Tensor)):
        same = type(a) is type(e) and (a == e or (a != a and e != e))
        return None if same else (inf, f"{path!r} is {a!r}, expected {e!r}")
    if a.shape != e.shape or a.dtype != e.dtype:
        return inf, f"{path!r} is {a.dtype} {tuple(a.shape)}, expected {e.dtype} {tuple(e.shape)}"
    a, e = a.detach().to(e.device), e.detach()
    if not (e.is_floating_point() or e.is_complex()):
        wrong = int((a != e).sum())
        return (inf, f"{path!r} differs in {wrong} of {e.numel()} {e.dtype} values") if wrong else None
    wide = torch.complex128 if e.is_complex() else torch.float64
    a, e = a.to(wide), e.to(wide)
    odd = ~(a.isfinite() & e.isfinite())
    if wrong := int((odd & (a != e) & ~(a.isnan() & e.isnan())).sum()):
        return inf, f"{path!r} differs in {wrong} of {e.numel()} values by an infinity or NaN"
    a, e = a.masked_fill(odd, 0), e.masked_fill(odd, 0)
    off, norm = float((a - e).norm()), float(e.norm())
    if off <= atol + rtol * norm:
        return None
    relative = off / norm if norm else inf
    return relative, (
        f"{path!r} is off by {relative:.1e}, rtol={rtol:g}, atol={atol:g}; |actual| {float(a.norm()):g}, |expected| {norm:g}"
    )


def _leaves(args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    found = []
    for where, tree in (*((f"args[{i}]", x) for i, x in enumerate(args)), *kwargs.items()):
        for path, x in zip(tree_paths(tree), tree_leaves(tree), strict=True):
            found.append((f"{where}.{path}" if path else where, x))
    return found


def _bits(x: Tensor | None) -> bytes | None:
    """Return what tells +0 from -0 and one NaN from another."""
    return None if x is None else x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _random_states() -> list[Tensor]:
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in gpus)]


def assert_pure(f: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run ``f(*args, **kwargs)`` and return its result, or fail if it changed an argument or drew global random numbers.

    Looked at, before and after: the bits, the version (torch counts in-place writes) and the ``.grad`` of every tensor in
    the arguments, which leaves the arguments hold, and torch's global random state.

    Raises AssertionError naming the tensor.

    >>> import torch, fstep.testing
    >>> fstep.testing.assert_pure(lambda tree: tree["x"] * 2, {"x": torch.ones(2)})
    tensor([2., 2.])
    >>> fstep.testing.assert_pure(lambda tree: tree["x"].mul_(1), {"x": torch.ones(2)})
    Traceback (most recent call last):
        ...
    AssertionError: assert_pure: args[0].x was written to in place (version 0 became 1)
    """
    held = _leaves(args, kwargs)
    tensors = [(path, x) for path, x in held if isinstance(x, Tensor)]
    before = [(_bits(x), x._version, x.grad, _bits(x.grad), x.requires_grad) for _, x in tensors]
    random = _random_states()
    result = f(*args, **kwargs)
    now = _leaves(args, kwargs)
    if [(path, id(x)) for path, x in now] != [(path, id(x)) for path, x in held]:
        raise AssertionError("assert_pure: the arguments hold other leaves than before")
    for (path, x), (bits, version, grad, grad_bits, requires_grad) in zip(tensors, before, strict=True):
        if x._version != version:
            raise AssertionError(f"assert_pure: {path} was written to in place (version {version} became {x._version})")
        if _bits(x) != bits:
            raise AssertionError(f"assert_pure: {path} has other bits than before")
        if x.grad is not grad or _bits(x.grad) != grad_bits:
            raise AssertionError(f"assert_pure: {path}.grad is not what it was")
        if x.requires_grad != requires_grad:
            raise AssertionError(f"assert_pure: {path}.requires_grad is not what it was")
    if len(random) != len(after := _random_states()) or not all(map(torch.equal, random, after)):
        raise AssertionError("assert_pure: torch's global random state moved; draw from a Key that is passed in")
    return result
