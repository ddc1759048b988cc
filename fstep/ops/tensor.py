"""Tensor parallelism: every weight matrix cut over the ranks of an axis, and the tokens between two blocks cut likewise.

                 all tokens, a part of the heads               all tokens, a part of ffn
    x ─ norm ─ tp_gather ─ q, k, v ─ attention ─ o ─ (+) ─ norm ─ tp_gather ─ gate, up ─ down ─ (+) ─
    │ a shard of the tokens        columns     rows │ tp_scatter              columns    rows   │ tp_scatter
    └───────────────────────────────────────────────┴─ a shard of the tokens ───────────────────┴─ a shard of the tokens

A column of a layer is a row of its weight [out, in]: cut along dim 0, each rank computes other outputs of all tokens. A
weight cut along dim 1 gives partial sums, which `tp_scatter` adds up and deals out. Norms and sums between blocks run on
ceil(T / size) tokens a rank; where T does not divide, the last shard ends in rows that stand for no token.

The loss and every value of all tokens are replicated over the axis. Gradients of `Shard` leaves are complete on their
rank; a leaf that all ranks hold sees only this rank's tokens or heads, and `tp_local` makes its gradient complete.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import Function

from fstep.mesh import exchange as ex
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import all_gather, reduce_scatter
from fstep.mesh.place import Copied, Range, Shard
from fstep.ops.layers import check_ids, embed, linear
from fstep.tree import NAMESPACE, check_type


def shard_length(tokens: int, axis: Axis) -> int:
    """Return how many rows a shard of ``tokens`` tokens has: the same on every rank."""
    return -(-tokens // axis.size)


def tp_gather(x: Any, *, axis: Axis, tokens: int | None = None) -> Tensor:
    """Gather a shard of the tokens to all of them. Input: a shard along dim 0; output: replicated, its gradient partial.

    In front of weights cut into columns: each rank goes on to other outputs, so the gradients that come back are addends.
    Transpose: `tp_scatter`. Shapes: ``[ceil(T / size), ...] -> [T, ...]`` with T given by ``tokens``; without it the rows
    that stand for no token come along.

    Raises ValueError if ``x`` is no shard of so many tokens.

    >>> import torch, fstep
    >>> f = lambda mesh: fstep.tp_gather(torch.arange(2) + 2 * mesh.tp.rank, axis=mesh.tp, tokens=3)
    >>> fstep.simulate(f, tp=2)
    [tensor([0, 1, 2]), tensor([0, 1, 2])]
    """
    check_type("tp_gather", "x", x, Tensor, "a tensor [tokens, ...]")
    check_axis("tp_gather", axis)
    if tokens is not None and len(x) != shard_length(tokens, axis):
        raise ValueError(
            f"tp_gather: x has {len(x)} rows, and a shard of {tokens} tokens over axis {axis.name!r} of size {axis.size} "
            f"has {shard_length(tokens, axis)}; pass what tp_scatter or tp_embed returned for these tokens"
        )
    if axis.size == 1:
        return x
    whole: Tensor = all_gather(x, axis=axis, grad="sum")
    return whole if tokens is None or tokens == len(whole) else whole[:tokens]


def tp_scatter(x: Tensor, *, axis: Axis) -> Tensor:
    """Add partial sums of all tokens, leaving each rank its tokens. Input: partial sums; output: a shard along dim 0.

    Behind weights cut into rows. Transpose: `tp_gather`. Shapes: ``[T, ...] -> [ceil(T / size), ...]``; where T does not
    divide, the last shards end in zeros.

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.tp_scatter(torch.arange(3) + mesh.tp.rank, axis=mesh.tp), tp=2)
    [tensor([1, 3]), tensor([5, 0])]
    """
    check_type("tp_scatter", "x", x, Tensor, "a tensor [tokens, ...]")
    check_axis("tp_scatter", axis)
    if axis.size == 1:
        return x
    if more := -len(x) % axis.size:
        x = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
    out: Tensor = reduce_scatter(x, axis=axis)
    return out


def tp_row_linear(x: Tensor, weight: Any, bias: Tensor | None = None, *, axis: Axis) -> Tensor:
    """Map with a weight cut along its inputs: ``tp_scatter(x @ weight.T) + bias``, the bias added once.

    ``x`` [T, in / size] is a shard of the features, what columns of the layer before gave; ``weight`` [out, in / size] a
    shard (a `Shard` along dim 1, or its tensor); ``bias`` [out] replicated, its gradient partial (see `tp_local`). Output:
    a shard of the tokens, [ceil(T / size), out]. On an axis of size 1 it is `linear`. For weights cut along their outputs
    there is no function of its own: it is `linear`, after `tp_gather`.

    Raises ValueError for a weight that is cut in another way.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     weight = fstep.Shard.cut(torch.tensor([[1.0, 10.0]]), axis=mesh.tp, dim=1)
    ...     x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, mesh.tp.rank :][:, :1]  # this rank's feature of both tokens
    ...     return fstep.tp_row_linear(x, weight, torch.tensor([0.5]), axis=mesh.tp)
    >>> fstep.simulate(f, tp=2)
    [tensor([[21.5000]]), tensor([[43.5000]])]
    """
    check_axis("tp_row_linear", axis)
    if isinstance(weight, Shard):
        part_of("tp_row_linear", weight, axis, dim=1)
        weight = weight.value
    if axis.size == 1:
        return linear(x, weight, bias)
    y = tp_scatter(linear(x, weight), axis=axis)
    return y if bias is None else y + bias


def tp_embed(tokens: Tensor, weight: Any, *, axis: Axis) -> Tensor:
    """Look up rows of a table cut by vocabulary. Input: tokens replicated, weight a shard; output: a shard of the tokens.

    Each rank looks up the tokens whose rows it has, and the sum over the ranks, of which one is not zero, is dealt out.
    ``tokens`` is [T], ``weight`` a `Shard` along dim 0 of [vocab, dim]; the result is [ceil(T / size), dim], the same bits
    as `embed` gives. The parts may be uneven. On an axis of size 1 it is `embed`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `embed` for an id outside the vocabulary.

    >>> import torch, fstep
    >>> table = torch.tensor([[0.0], [1.0], [2.0]])
    >>> f = lambda mesh: fstep.tp_embed(torch.tensor([2, 0]), fstep.Shard.cut(table, axis=mesh.tp, dim=0), axis=mesh.tp)
    >>> fstep.simulate(f, tp=2)
    [tensor([[2.]]), tensor([[0.]])]
    """
    table, (start, stop), vocab = part_of("tp_embed", weight, axis, dim=0)
    if axis.size == 1:
        return embed(tokens, table)
    check_ids("tp_embed", "token", tokens, vocab)
    here = (tokens >= start) & (tokens < stop)
    rows = embed(torch.where(here, tokens - start, 0), table)
    return tp_scatter(torch.where(here[:, None], rows, 0), axis=axis)


def part_of(function: str, weight: Any, axis: Axis, *, dim: int) -> tuple[Tensor, Range, int]:
    """Return the tensor, the span and the whole length of a weight cut along ``dim``; refuse one that is cut otherwise."""
    check_axis(function, axis)
    if isinstance(weight, Copied):
        weight = weight.value
    if isinstance(weight, Tensor) and axis.size == 1:
        return weight, (0, weight.shape[dim]), weight.shape[dim]
    if not isinstance(weight, Shard) or weight.axis.ranks != axis.ranks or weight.dim != dim:
        is_cut = f"is cut along dim {weight.dim} over {weight.axis}" if isinstance(weight, Shard) else "is not cut"
        fix = f"pass Shard.cut(weight, axis=axis, dim={dim}), as model.part(params, mesh=mesh) does"
        if isinstance(weight, Shard) and axis.size == 1:
            fix = "give this call the mesh or axis that the weight is cut over, as with mesh=mesh"
        raise ValueError(f"{function}: weight {is_cut}, and axis {axis.name!r} has size {axis.size}; {fix}")
    if weight.of < axis.size:
        raise ValueError(
            f"{function}: weight has length {weight.of} along dim {dim}, less than the {axis.size} ranks of axis "
            f"{axis.name!r}, so that some have none of it; use {weight.of} ranks or fewer"
        )
    return weight.value, weight.span, weight.of


def tp_local(tree: Any, *, axis: Axis) -> Any:
    """Return the tensors that this rank computes with: shards as they are, replicated leaves with a complete gradient.

    A leaf that every rank of ``axis`` holds (a norm, the bias of a layer cut into rows) meets only this rank's tokens or
    heads, so its gradient is an addend. This is `pvary` for all of them together: the identity forward, and one sum over the
    ranks backward (per dtype) for the whole tree, a layer say. A `Shard` over ``axis`` is taken out of its node, its
    gradient being complete. On an axis of size 1 it is the tree itself.

    >>> import torch, fstep
    >>> def loss(w, mesh):
    ...     p = fstep.tp_local(w, axis=mesh.tp)
    ...     return fstep.psum((mesh.tp.rank + 1) * p["norm"] + p["q"].sum(), axis=mesh.tp)
    >>> def f(mesh):
    ...     w = {"norm": torch.tensor(1.0), "q": fstep.Shard.cut(torch.ones(2), axis=mesh.tp, dim=0)}
    ...     return fstep.value_and_grad(loss)(w, mesh)[1]
    >>> [(g["norm"], g["q"].value) for g in fstep.simulate(f, tp=2)]
    [(tensor(3.), tensor([1.])), (tensor(3.), tensor([1.]))]
    """
    check_axis("tp_local", axis)
    if axis.size == 1:
        return tree

    def stop(x: Any) -> bool:
        return isinstance(x, Shard) and x.axis.name == axis.name

    leaves, spec = optree.tree_flatten(tree, stop, none_is_leaf=True, namespace=NAMESPACE)
    out = [x.value if stop(x) else x for x in leaves]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(leaves):
        # Frozen leaves have no gradient to complete; which ones are frozen, all ranks agree on.
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad and torch.is_grad_enabled():
            by_dtype.setdefault(x.dtype, []).append(i)
    for rows in by_dtype.values():
        marked = _VaryTogether.apply(axis, *(leaves[i] for i in rows))  # type: ignore[no-untyped-call]
        for i, x in zip(rows, marked, strict=True):
            out[i] = x
    return optree.tree_unflatten(spec, out)


class _VaryTogether(Function):
    @staticmethod
    def forward(axis: Axis, *leaves: Tensor) -> tuple[Tensor, ...]:
        ex.transport("tp_local", axis)
        return tuple(x.view_as(x) for x in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.axis = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = ex.psum(torch.cat([g.reshape(-1) for g in gradients]), ctx.axis, "gradient of tp_local")
        parts = torch.split(total, [g.numel() for g in gradients])
        return None, *(part.view(g.shape) for part, g in zip(parts, gradients, strict=True))
