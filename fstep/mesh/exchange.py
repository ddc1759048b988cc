"""The autograd functions behind `collectives`, in pairs: each one's backward is the other, so derivatives go to any order.

    psum ⇄ pvary               all_gather("sum") ⇄ reduce_scatter      all_gather("slice") ⇄ take_shard
    all_to_all ⇄ all_to_all    permute ⇄ permute                       broadcast ⇄ to_source
    as_partial ⇄ the identity

They are defined once, here: a class defined inside a step is a reference cycle that keeps the step's tensors alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.mesh.axis import Axis
from fstep.mesh.transport import Transport


def transport(function: str, axis: Axis) -> Transport:
    """Return what moves tensors on an axis of more than one rank."""
    if axis.transport is None:
        raise ValueError(
            f"{function}: axis {axis.name!r} has {axis.size} ranks and no transport between them; take the mesh from "
            "simulate() or mesh_from_env()"
        )
    return axis.transport


def dim_of(x: Tensor, dim: int) -> int:
    """Count a dimension from the front."""
    return dim % max(x.dim(), 1)


def permutation(to: int | Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Return where each rank gives to."""
    if isinstance(to, int):
        return tuple((rank + to) % axis.size for rank in range(axis.size))
    if sorted(to) != list(range(axis.size)):
        raise ValueError(
            f"ppermute: to is {list(to)}; pass for each of the {axis.size} ranks of axis {axis.name!r} the rank that it "
            "gives to, each once"
        )
    return tuple(to)


def _apply(function: type[Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _name(name: str, x: Tensor) -> str:
    """Name a call whose gradient communicates, so that ranks which will differ there already differ here."""
    return f"{name} with gradient" if x.requires_grad else name


def _cut(x: Tensor, dim: int, size: int) -> Tensor:
    """Put ``size`` parts of a dimension into a new first one: [.., size * n, ..] -> [size, .., n, ..]."""
    shape = (*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :])
    return x.reshape(shape).movedim(dim, 0).contiguous()


def _join(parts: Tensor, dim: int) -> Tensor:
    """Lay parts side by side: [size, .., n, ..] -> [.., size * n, ..]."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def psum(x: Tensor, axis: Axis, action: str = "psum") -> Tensor:
    """Partial -> replicated."""
    return _apply(_Psum, x, axis, action)


class _Psum(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, action: str) -> Tensor:
        return transport(action, axis).all_reduce(x.contiguous(), action=action).wait()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.axis = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return pvary(g, ctx.axis), None, None


def pvary(x: Tensor, axis: Axis) -> Tensor:
    """Replicated -> replicated, each rank to go its own way with it."""
    return _apply(_Pvary, x, axis)


class _Pvary(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis) -> Tensor:
        transport("pvary", axis)  # a mesh without one should fail before the backward pass does
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.axis = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return psum(g, ctx.axis, "gradient of pvary"), None


def as_partial(x: Tensor, axis: Axis) -> Tensor:
    """Replicated -> partial."""
    return _apply(_AsPartial, x, axis)


class _AsPartial(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis) -> Tensor:
        transport("as_partial", axis)
        return x.clone() if axis.rank == 0 else torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


def all_gather(x: Tensor, axis: Axis, dim: int, grad: str, action: str = "all_gather") -> Tensor:
    """Shard -> replicated."""
    return _apply(_AllGather, x, axis, dim_of(x, dim), grad, action)


class _AllGather(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, grad: str, action: str) -> Tensor:
        name = _name(action, x) if grad == "sum" else action
        return _join(transport(action, axis).all_gather(x.contiguous(), action=name).wait(), dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.dim, ctx.grad, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.grad == "sum":
            back = reduce_scatter(g, ctx.axis, ctx.dim, "gradient of all_gather")
        else:
            back = take_shard(g, ctx.axis, ctx.dim)
        return back, None, None, None, None


def reduce_scatter(x: Tensor, axis: Axis, dim: int, action: str = "reduce_scatter") -> Tensor:
    """Partial -> shard."""
    return _apply(_ReduceScatter, x, axis, dim_of(x, dim), action)


class _ReduceScatter(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, action: str) -> Tensor:
        parts = _cut(x, dim, axis.size)
        return transport(action, axis).reduce_scatter(parts, action=_name(action, x)).wait()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.dim, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return all_gather(g, ctx.axis, ctx.dim, "sum", "gradient of reduce_scatter"), None, None, None


def take_shard(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Replicated -> shard."""
    return _apply(_TakeShard, x, axis, dim_of(x, dim))


class _TakeShard(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int) -> Tensor:
        transport("take_shard", axis)
        # A copy: a view would keep the whole alive, and autograd does not let views of such functions be written to.
        return x.chunk(axis.size, dim)[axis.rank].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return all_gather(g, ctx.axis, ctx.dim, "slice", "gradient of take_shard"), None, None


def all_to_all(x: Tensor, axis: Axis, split: int, concat: int, action: str = "all_to_all") -> Tensor:
    """Shard along ``concat`` -> shard along ``split``."""
    return _apply(_AllToAll, x, axis, dim_of(x, split), dim_of(x, concat), action)


class _AllToAll(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, split: int, concat: int, action: str) -> Tensor:
        parts = _cut(x, split, axis.size)
        return _join(transport(action, axis).all_to_all(parts, action=_name(action, x)).wait(), concat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.split, ctx.concat, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return all_to_all(g, ctx.axis, ctx.concat, ctx.split, "gradient of all_to_all"), None, None, None, None


def permute(x: Tensor, axis: Axis, to: tuple[int, ...], action: str = "ppermute") -> Tensor:
    """Shard -> the same shard elsewhere."""
    return _apply(_Permute, x, axis, to, action)


class _Permute(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, to: tuple[int, ...], action: str) -> Tensor:
        return transport(action, axis).permute(x.contiguous(), to, action=_name(action, x)).wait()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.to, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        back = tuple(ctx.to.index(rank) for rank in range(ctx.axis.size))
        return permute(g, ctx.axis, back, "gradient of ppermute"), None, None, None


def broadcast(x: Tensor, axis: Axis, src: int, grad: str, action: str = "broadcast") -> Tensor:
    """One rank's -> replicated."""
    return _apply(_Broadcast, x, axis, src, grad, action)


class _Broadcast(Function):
    @staticmethod
    def forward(x: Tensor, axis: Axis, src: int, grad: str, action: str) -> Tensor:
        name = _name(action, x) if grad == "sum" else action
        return transport(action, axis).broadcast(x.contiguous(), src, action=name).wait()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.src, ctx.grad, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return to_source(g, ctx.axis, ctx.src, ctx.grad), None, None, None, None


def to_source(g: Tensor, axis: Axis, src: int, grad: str) -> Tensor:
    """The gradient of a broadcast: one rank's, and 0 on the others."""
    return _apply(_ToSource, g, axis, src, grad)


class _ToSource(Function):
    @staticmethod
    def forward(g: Tensor, axis: Axis, src: int, grad: str) -> Tensor:
        if grad == "sum":
            action = "gradient of broadcast"
            total = transport(action, axis).all_reduce(g.contiguous(), action=action).wait()
        else:
            total = g.clone()
        return total if axis.rank == src else torch.zeros_like(total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.src, ctx.grad = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return broadcast(g, ctx.axis, ctx.src, ctx.grad, "gradient of the gradient of broadcast"), None, None, None
