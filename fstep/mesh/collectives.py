"""Functions by which ranks exchange values, each with its transpose: what it does to gradients on the way back.

    shard         each rank holds its own part                  gradient: a shard
    partial       each rank holds an addend; the value is the   gradient: replicated (everyone's addend counts alike)
                  sum
    replicated    the same bits on every rank                   gradient: replicated, or partial where each rank puts its
                                                                own use of the value into its own part of the loss

    forward        in -> out                      transpose
    psum           partial    -> replicated       identity (pvary)
    pvary          replicated -> replicated       psum
    as_partial     replicated -> partial          identity
    all_gather     shard      -> replicated       reduce_scatter (grad="sum"), take_shard (grad="slice")
    reduce_scatter partial    -> shard            all_gather
    take_shard     replicated -> shard            all_gather
    all_to_all     shard      -> shard            all_to_all back
    ppermute       shard      -> shard            ppermute back
    broadcast      one rank's -> replicated       to that rank: the sum (grad="sum"), its own (grad="slice")

Each takes a tensor or a tree of tensors, and returns it unchanged on an axis of size 1. Gradients communicate too, so that
either all ranks of an axis differentiate a call or none does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fstep.mesh import exchange as ex
from fstep.mesh.axis import Axis, check_axis
from fstep.tree import tree_map

Grad = Literal["sum", "slice"]


def psum(x: Any, *, axis: Axis) -> Any:
    """Add ``x`` over the ranks of ``axis``. Input: partial sums; output: replicated. Transpose: the identity.

    ``y = x_0 + x_1 + ...`` in the order of ranks, so every rank has the same bits. Its gradient has to be replicated too,
    as it is if every rank goes on to compute the same with ``y``; if each rank uses ``y`` in its own way, pass it through
    `pvary` first. Shapes: the same on every rank.

    Raises TypeError for what is no tensor or is bool, MeshError if ranks call different things.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.psum(torch.tensor([1.0, mesh.tp.rank]), axis=mesh.tp), tp=2)
    [tensor([2., 1.]), tensor([2., 1.])]
    """
    return _each("psum", x, axis, lambda leaf: ex.psum(leaf, axis), adds=True)


def pvary(x: Any, *, axis: Axis) -> Any:
    """Mark where a replicated value goes separate ways. Input and output: replicated. Transpose: `psum`.

    The identity, and no communication; but each rank's gradient of ``y`` is then taken as an addend, and the gradient of
    ``x`` is their sum, the same on every rank. It stands in front of a computation that differs from rank to rank: before
    the column-parallel weight of a tensor-parallel layer, say, which ends in a `psum`. Shapes: any.

    Raises TypeError for what is no tensor.

    >>> import torch, fstep
    >>> def f(mesh):  # rank r computes r + 1 times w
    ...     own = lambda w: fstep.psum((mesh.tp.rank + 1) * fstep.pvary(w, axis=mesh.tp), axis=mesh.tp)
    ...     return fstep.value_and_grad(own)(torch.tensor(1.0))
    >>> fstep.simulate(f, tp=2)
    [(tensor(3.), tensor(3.)), (tensor(3.), tensor(3.))]
    """
    return _each("pvary", x, axis, lambda leaf: ex.pvary(leaf, axis))


def as_partial(x: Any, *, axis: Axis) -> Any:
    """Turn a value that every rank has into addends of it. Input: replicated; output: partial. Transpose: the identity.

    The inverse of `psum`: the first rank keeps ``x``, the others get zeros, and the sum is ``x`` (only -0.0 becomes 0.0). No
    communication. It is for a loss that all ranks compute alike and that will be added up over them, as `finalize_grads`
    does: without it the loss would count once a rank. Its gradient is passed on to all ranks, since all of them took part.
    Shapes: any.

    Raises TypeError for what is no tensor or is bool.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     loss = lambda x: fstep.as_partial(x.square(), axis=mesh.cp)
    ...     return fstep.value_and_grad(loss)(torch.tensor(3.0))
    >>> fstep.simulate(f, cp=2)
    [(tensor(9.), tensor(6.)), (tensor(0.), tensor(6.))]
    """
    return _each("as_partial", x, axis, lambda leaf: ex.as_partial(leaf, axis), adds=True)


def pmax(x: Any, *, axis: Axis) -> Any:
    """Take the maximum of ``x`` over the ranks of ``axis``, element by element. Input: a shard; output: replicated.

    It has no gradient: what it is for (the shift of a softmax, the largest of some counts) needs none. NaN on one rank is
    NaN on all. Raises ValueError for an ``x`` that requires a gradient, TypeError for what is no tensor or is bool.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.pmax(torch.tensor([5, mesh.tp.rank]), axis=mesh.tp), tp=2)
    [tensor([5, 1]), tensor([5, 1])]
    """

    def f(leaf: Tensor) -> Tensor:
        if torch.is_grad_enabled() and leaf.requires_grad:
            raise ValueError("pmax: x requires a gradient, and a maximum over ranks has none; pass x.detach()")
        return ex.transport("pmax", axis).all_reduce(leaf.contiguous(), action="pmax", op="max").wait()

    return _each("pmax", x, axis, f, adds=True)


def all_gather(x: Any, *, axis: Axis, dim: int = 0, grad: Grad) -> Any:
    """Lay the shards of all ranks side by side along ``dim``. Input: a shard; output: replicated.

    Shapes: ``[..., n, ...] -> [..., size * n, ...]``, the same n on every rank. ``grad`` says what the gradient of the
    output will be, which the function cannot know and which a wrong loss value would not show:

    - ``"sum"``: partial. The loss is a partial sum: each rank uses the output for its own part. Transpose: `reduce_scatter`.
    - ``"slice"``: replicated. Every rank computes the same whole loss from the output. Transpose: `take_shard`.

    Raises ValueError for another ``grad`` or a ``dim`` that ``x`` has not.

    >>> import torch, fstep
    >>> def f(mesh, grad):
    ...     loss = lambda x: fstep.all_gather(x, axis=mesh.cp, grad=grad).square().sum()
    ...     return fstep.value_and_grad(loss)(torch.tensor([3.0 + mesh.cp.rank]))[1]
    >>> fstep.simulate(lambda mesh: f(mesh, "slice"), cp=2)  # one loss, computed twice
    [tensor([6.]), tensor([8.])]
    >>> fstep.simulate(lambda mesh: f(mesh, "sum"), cp=2)  # two losses, added
    [tensor([12.]), tensor([16.])]
    """
    check_grad("all_gather", grad)
    return _each("all_gather", x, axis, lambda leaf: ex.all_gather(leaf, axis, dim, grad), dims=(dim,))


def reduce_scatter(x: Any, *, axis: Axis, dim: int = 0) -> Any:
    """Add ``x`` over the ranks and leave each rank its part of the sum. Input: partial sums; output: a shard along ``dim``.

    ``psum`` followed by `take_shard`, at half the traffic; transpose: `all_gather`. Shapes:
    ``[..., size * n, ...] -> [..., n, ...]``.

    Raises ValueError if ``dim`` does not divide by the size of the axis, TypeError for bool.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.reduce_scatter(torch.tensor([1.0, mesh.dp.rank]), axis=mesh.dp), dp=2)
    [tensor([2.]), tensor([1.])]
    """
    return _each(
        "reduce_scatter",
        x,
        axis,
        lambda leaf: ex.reduce_scatter(leaf, axis, dim),
        dims=(dim,),
        divide=(dim,),
        adds=True,
    )


def take_shard(x: Any, *, axis: Axis, dim: int = 0) -> Any:
    """Keep this rank's part of ``x``. Input: replicated; output: a shard along ``dim``. Transpose: `all_gather`.

    The inverse of `all_gather`. No communication forward; backward the gradients of all parts are gathered, so that the
    gradient of ``x`` is replicated, as ``x`` is. Shapes: ``[..., size * n, ...] -> [..., n, ...]``.

    Raises ValueError if ``dim`` does not divide by the size of the axis.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.take_shard(torch.arange(4), axis=mesh.tp), tp=2)
    [tensor([0, 1]), tensor([2, 3])]
    """
    return _each(
        "take_shard",
        x,
        axis,
        lambda leaf: ex.take_shard(leaf, axis, dim),
        dims=(dim,),
        divide=(dim,),
    )


def all_to_all(x: Any, *, axis: Axis, split_dim: int, concat_dim: int) -> Any:
    """Cut ``x`` along ``split_dim`` and give part i to rank i; lay what arrives side by side along ``concat_dim``.

    Input: a shard along ``concat_dim``; output: a shard along ``split_dim``, of the same whole. Transpose: the way back,
    with the two dimensions swapped. Shapes: ``split_dim`` shrinks by the size of the axis, ``concat_dim`` grows by it.

    Raises ValueError if ``split_dim`` does not divide by the size of the axis.

    >>> import torch, fstep
    >>> def f(mesh):  # two tokens on each rank, all heads -> all four tokens, one head on each rank
    ...     tokens = torch.arange(2) + 2 * mesh.cp.rank
    ...     return fstep.all_to_all(tokens[:, None] * 10 + torch.arange(2), axis=mesh.cp, split_dim=1, concat_dim=0).T
    >>> fstep.simulate(f, cp=2)
    [tensor([[ 0, 10, 20, 30]]), tensor([[ 1, 11, 21, 31]])]
    """

    def f(leaf: Tensor) -> Tensor:
        return ex.all_to_all(leaf, axis, split_dim, concat_dim)

    return _each("all_to_all", x, axis, f, dims=(split_dim, concat_dim), divide=(split_dim,))


def ppermute(x: Any, to: int | Sequence[int], *, axis: Axis) -> Any:
    """Hand ``x`` on to another rank. Input and output: a shard. Transpose: the way back.

    ``to`` is a distance, as in a ring (rank r gives to ``(r + to) % size``), or a permutation (rank r gives to ``to[r]``).
    Shapes: the same on every rank.

    Raises ValueError if ``to`` is no permutation of the ranks.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: int(fstep.ppermute(torch.tensor(mesh.cp.rank), 1, axis=mesh.cp)), cp=3)
    [2, 0, 1]
    """
    check_axis("ppermute", axis)
    dst = ex.permutation(to, axis)
    return _each("ppermute", x, axis, lambda leaf: ex.permute(leaf, axis, dst))


def broadcast(x: Any, *, axis: Axis, src: int, grad: Grad) -> Any:
    """Give every rank what rank ``src`` holds. Input: one rank's value; output: replicated.

    Shapes: the same on every rank; the values of ranks other than ``src`` do not matter, and their gradient is 0. That of
    ``src`` is, as for `all_gather`: with ``grad="sum"`` the sum over the ranks (each uses the output for its own part of
    the loss), with ``grad="slice"`` its own (all ranks compute the same loss).

    Raises ValueError for another ``grad`` or a ``src`` that is no rank of the axis.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: int(fstep.broadcast(torch.tensor(mesh.rank), axis=mesh.pp, src=1, grad="slice")), pp=2)
    [1, 1]
    """
    check_axis("broadcast", axis)
    check_grad("broadcast", grad)
    if not 0 <= src < axis.size:
        raise ValueError(f"broadcast: src is {src}, and axis {axis.name!r} has ranks 0 to {axis.size - 1}")
    return _each("broadcast", x, axis, lambda leaf: ex.broadcast(leaf, axis, src, grad))


def check_grad(function: str, grad: str) -> None:
    """Refuse a gradient that is neither of the two."""
    if grad not in ("sum", "slice"):
        raise ValueError(
            f'{function}: grad is {grad!r}; pass "sum" if the loss is a partial sum over the axis, "slice" if every rank '
            "computes the same loss"
        )


def _each(
    function: str,
    x: Any,
    axis: Axis,
    f: Callable[[Tensor], Any],
    *,
    dims: Sequence[int] = (),
    divide: Sequence[int] = (),
    adds: bool = False,
) -> Any:
    """Check every leaf, on any axis, and map ``f`` over the leaves if there is somebody to talk to."""
    check_axis(function, axis)

    def check(leaf: Any) -> None:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{function}: x holds a {type(leaf).__name__}; pass a tensor or a tree of tensors")
        if adds and leaf.dtype == torch.bool:
            raise TypeError(f"{function}: x is bool; convert it to a number first, x.to(torch.int64)")
        for dim in dims:
            if not -leaf.dim() <= dim < leaf.dim():
                raise ValueError(f"{function}: there is no dim {dim} in shape {tuple(leaf.shape)}; give x that dimension")
        for dim in divide:
            if leaf.shape[dim] % axis.size:
                more = -leaf.shape[dim] % axis.size
                raise ValueError(
                    f"{function}: dim {dim} has {leaf.shape[dim]} elements, which do not divide over axis {axis.name!r} of "
                    f"size {axis.size}; pad it by {more}"
                )

    tree_map(check, x)
    if axis.size == 1:
        return x
    # An autograd function does not see that nothing is recorded, and ranks compare whether something is.
    return tree_map(f if torch.is_grad_enabled() else lambda leaf: f(leaf.detach()), x)
