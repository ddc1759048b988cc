"""ZeRO: parameters cut over the ranks that compute with them, whole only while they are used.

    shard_params     params ──> pieces                         once, at the start
    gather_params    pieces ──> params     its gradient: summed over the axis, back in pieces
    scatter_grads    gradients of params ──> gradients of pieces
    unshard_params   pieces ──> params     to look at, to generate with

Where the gather stands decides what it is. Around the loop over microbatches (one gather and one sum a step) it saves the
memory of optimizer state and gradients, which others call ZeRO-1 and ZeRO-2; in the loop over layers, `fold_layers`, that of
the parameters too, ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.autograd import Function

from fstep.grad.pieces import Pieces, as_it_is, finish_sum, is_pieces, lay_out, start_gather, start_sum, wholes
from fstep.mesh.axis import Axis
from fstep.mesh.place import Copied, Shard, places
from fstep.tree import NAMESPACE, check_type, path_name, tree_paths

# The axes over which gradients are partial sums, by the names that `Mesh` gives them and their union.
DATA = ("dp", "cp", "dp+cp")
SUMS = ("microbatch", "step")


def _whole_layer(path: str) -> bool:
    keys = path.split(".")
    return len(keys) > 1 and keys[-2] == "layers"


def shard_params(
    params: Any,
    axis: Axis,
    *,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    sums: Literal["microbatch", "step"] = "microbatch",
    units: Callable[[str], bool] = _whole_layer,
) -> Any:
    """Cut every unit of ``params`` over ``axis``: each becomes a `Pieces` with this rank's part of its parameters.

    A unit is gathered at once. ``units(path)`` says whether the subtree at ``path`` is one, asked from the top down, and a
    leaf always is; by default each child of ``layers`` is one (``layers.0``), as `fold_layers` wants them. (If ``layers``
    itself is one unit, all of it is whole at once: pass it through `gather_params` first.) `Shard` and `Copied` inside a
    unit stay, so that a tensor-parallel slice is cut further; inside `Stages` every stage's params are cut. On an axis of
    size 1 the result is ``params``.

    ``dtype`` is what floating-point parameters are gathered in, by default their own; give it what the model computes in,
    and half as much is moved. ``reduce_dtype`` is what gradients are summed in, by default that of the piece: with float32
    pieces gathered in bfloat16, the sum is in float32. Gradients arrive in the dtype of the piece either way.

    ``sums`` says when `pp_forward_backward` sums gradients over the ranks: after every "microbatch", so that a rank never
    holds more than a unit's whole gradients, or once a "step", which moves less where there are many microbatches, needs
    memory for all whole gradients, and adds in the order of plain data parallel: the results have the same bits.

    Inputs: params *replicated* over the axis. Outputs: *shards* of them, copies, the pieces of a unit being views of one
    buffer. ``axis`` is that of the ranks with different documents or tokens: ``mesh.over("dp", "cp")``, or one of the two.

    Raises TypeError for a leaf that is no tensor or a ``dtype`` that is not floating-point, ValueError for another axis and
    for params that are sharded already, or cut by a `Shard` over some of the same ranks.

    >>> import torch, fstep
    >>> params = {"layers": {0: {"q": torch.arange(24.0).view(4, 6)}}}
    >>> zero = fstep.simulate(lambda mesh: fstep.shard_params(params, mesh.dp), dp=2)
    >>> [rank["layers"][0].value["q"].tolist()[:3] for rank in zero]
    [[0.0, 1.0, 2.0], [16.0, 17.0, 18.0]]
    """
    check_type("shard_params", "axis", axis, Axis, 'an axis of the mesh, e.g. mesh.over("dp", "cp")')
    for name, value in (("dtype", dtype), ("reduce_dtype", reduce_dtype)):
        if value is not None and not value.is_floating_point:
            raise TypeError(f"shard_params: {name} is {value}; pass a floating-point dtype, or None")
    if sums not in SUMS:
        raise ValueError(f"shard_params: sums is {sums!r}; pass one of {', '.join(map(repr, SUMS))}")
    # Ranks of tp or pp hold other parameters, or sum gradients of their own: pieces of unlike things would be put together.
    if axis.name not in DATA:
        raise ValueError(
            f"shard_params: axis is {axis.name!r}, whose ranks do not hold the same params for other tokens; pass "
            'mesh.over("dp", "cp"), mesh.dp or mesh.cp'
        )
    for path, node in zip(*_open(params), strict=True):
        if isinstance(node, Pieces):
            raise ValueError(f"shard_params: {path!r} is sharded already; pass what unshard_params returns")
    if axis.size == 1:
        return params

    def cut(unit: Any, name: str) -> Any:
        return _cut(unit, name, axis, dtype, reduce_dtype, sums)

    return _visit(params, (), units, cut)


def _open(tree: Any) -> tuple[list[str], list[Any]]:
    """Return the paths and the values of a tree whose leaves are its ZeRO nodes and what is in none of them."""
    paths, values, _ = optree.tree_flatten_with_path(tree, is_pieces, none_is_leaf=True, namespace=NAMESPACE)
    return [path_name(path) for path in paths], values


def _visit(tree: Any, path: tuple[Any, ...], units: Callable[[str], bool], cut: Callable[[Any, str], Any]) -> Any:
    """Apply ``cut`` to the units of a tree."""
    name = path_name(path)
    leaf = isinstance(tree, Shard | Copied) or optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE)
    if leaf or (name and units(name)):
        return cut(tree, name)
    node = optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=NAMESPACE)
    children = [_visit(x, (*path, key), units, cut) for x, key in zip(node.children, node.entries, strict=True)]
    return node.unflatten_func(node.metadata, children)


@torch.no_grad()
def _cut(unit: Any, name: str, axis: Axis, *options: Any) -> Any:
    leaves = optree.tree_leaves(unit, none_is_leaf=True, namespace=NAMESPACE)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(f"shard_params: a leaf of {name!r} is a {type(leaf).__name__}; pass a tree of tensors")
    for place in places(unit):
        for other in place.axes:
            if len(set(other.ranks) & set(axis.ranks)) > 1:
                raise ValueError(
                    f"shard_params: {'.'.join(x for x in (name, place.path) if x)!r} is a Shard over axis {other.name!r}, "
                    f"ranks of which are on axis {axis.name!r} too; pass params that all ranks of {axis.name!r} hold alike"
                )
    if all(leaf is None for leaf in leaves):
        return unit
    node = Pieces(unit, axis, *lay_out(leaves, axis.size), *options)
    buffers: dict[int, Tensor] = {}
    pieces: list[Tensor | None] = []
    for leaf, slot in zip(leaves, node.slots, strict=True):
        if leaf is None or slot is None:
            pieces.append(None)
            continue
        buffer = buffers.setdefault(slot.group, leaf.new_zeros(node.parts[slot.group]))
        start, stop = node.span(slot)
        pieces.append(buffer[node.at(slot)].copy_(leaf.reshape(-1)[start:stop]))
    return replace(node, value=node.fill(pieces))


def gather_params(tree: Any) -> Any:
    """Return ``tree`` with its units whole: every `Pieces` becomes the tree it was cut from.

    One all-gather a unit (and dtype). The gradient is the transpose: all gradients of a unit are copied into one buffer,
    summed over the axis and scattered, so that what arrives at a piece is complete. A tree without `Pieces` comes back as it
    is.

    Inputs: *shards* over the axis of the nodes. Outputs: *replicated*; cotangents *partial sums*.

    >>> import torch, fstep
    >>> params = {"w": torch.tensor([2.0, 3.0])}
    >>> def f(mesh):
    ...     zero = fstep.shard_params(params, mesh.dp)
    ...     loss = lambda p, x: (fstep.gather_params(p)["w"] * x).sum()
    ...     return fstep.value_and_grad(loss)(zero, mesh.dp.rank + 1.0)
    >>> (a, grads), (b, empty) = fstep.simulate(f, dp=2)
    >>> a, b, grads["w"].value, empty["w"].value
    (tensor(5.), tensor(10.), tensor([3., 3.]), tensor([]))
    """

    def gather(node: Any) -> Any:
        return node.fill(_call(_Gather, as_it_is(node), node.dtype, *node.leaves())) if is_pieces(node) else node

    return optree.tree_map(gather, tree, is_leaf=is_pieces, none_is_leaf=True, namespace=NAMESPACE)


def gather_ahead(tree: Any) -> None:
    """Begin to gather the units of a tree inside a call of `pp_forward_backward`; `gather_params` will find them begun."""
    for node in optree.tree_leaves(tree, is_leaf=is_pieces, namespace=NAMESPACE):
        if is_pieces(node) and as_it_is(node).call is not None and node.call.gathering is None:
            node.call.gathering = start_gather(node, [None if x is None else x.detach() for x in node.leaves()], node.dtype)


def scatter_grads(grads: Any, params: Any) -> Any:
    """Turn gradients of whole params into gradients of ``params``, which are cut: the transpose of `gather_params`.

    For gradients that were taken of ``gather_params(params)``, around a loop over microbatches. Gradients are summed over
    the axis in ``reduce_dtype``; ``None``, the gradient of a frozen leaf, stays ``None``.

    Inputs: gradients that are *partial sums* over the axis. Outputs: *shards* of the sum.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     zero = fstep.shard_params({"w": torch.tensor([2.0, 3.0]), "frozen": torch.ones(1)}, mesh.dp)
    ...     return fstep.scatter_grads({"w": torch.tensor([1.0, 10.0]), "frozen": None}, zero)
    >>> fstep.simulate(f, dp=2)[0]["w"].value
    tensor([ 2., 20.])
    """

    def scatter(node: Any, found: Any) -> Any:
        if not is_pieces(node):
            return found
        spec = optree.tree_structure(node.value, none_is_leaf=True, namespace=NAMESPACE)
        try:
            given = spec.flatten_up_to(found)
        except ValueError as error:
            raise ValueError(
                f"scatter_grads: a unit has the leaves {tree_paths(node.value)}, and grads has a {type(found).__name__} of "
                "another structure there; pass gradients of gather_params(params), None for each frozen leaf"
            ) from error
        for at, (g, slot) in enumerate(zip(given, node.slots, strict=True)):
            if g is not None and slot is not None and g.shape != slot.shape:
                path = tree_paths(node.fill(range(len(given))))[at]
                raise ValueError(
                    f"scatter_grads: the gradient of {path or 'a unit'!r} has shape {tuple(g.shape)}, and its parameter "
                    f"{slot.shape}; pass gradients of gather_params(params)"
                )
        like = [None if g is None else x for x, g in zip(node.leaves(), given, strict=True)]
        return replace(node, value=node.fill(_call(_Scatter, node, tuple(like), *given)))

    return optree.tree_map(scatter, params, grads, is_leaf=is_pieces, none_is_leaf=True, namespace=NAMESPACE)


@torch.no_grad()
def unshard_params(tree: Any) -> Any:
    """Return ``tree`` with its units whole, in the dtype of the pieces and without a gradient: to look at, or to generate.

    Any tree of the params' structure will do: gradients, an optimizer's moments.

    Inputs: *shards* over the axis of the nodes. Outputs: *replicated*.

    >>> import torch, fstep
    >>> params = {"layers": {0: {"q": torch.arange(3.0)}}}
    >>> fstep.simulate(lambda mesh: fstep.unshard_params(fstep.shard_params(params, mesh.dp)), dp=2)[1]
    {'layers': {0: {'q': tensor([0., 1., 2.])}}}
    """

    def gather(node: Any) -> Any:
        return node.fill(_whole(replace(node, call=None), None, node.leaves())) if is_pieces(node) else node

    return optree.tree_map(gather, tree, is_leaf=is_pieces, none_is_leaf=True, namespace=NAMESPACE)


def _whole(node: Pieces, dtype: torch.dtype | None, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    started = (node.call and node.call.take()) or start_gather(node, leaves, dtype)
    return wholes(node, leaves, [None if pending is None else pending.wait() for pending in started])


def _call(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


class _Gather(Function):
    @staticmethod
    def forward(node: Pieces, dtype: torch.dtype | None, *leaves: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(_whole(node, dtype, leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.node, _, *leaves = inputs
        wanted = zip(leaves, ctx.needs_input_grad[2:], strict=True)
        ctx.like = tuple(x.detach() if x is not None and needed else None for x, needed in wanted)
        # Otherwise frozen weights would get gradients, since others of their unit have some.
        ctx.mark_non_differentiable(*(y for x, y in zip(ctx.like, output, strict=True) if x is None and y is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.node.call is not None:
            ctx.node.call.add(ctx.node, ctx.like, grads)
            return None, None, *(None for _ in grads)
        return None, None, *_call(_Scatter, ctx.node, ctx.like, *grads)


class _Scatter(Function):
    @staticmethod
    def forward(node: Pieces, like: tuple[Tensor | None, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(finish_sum(node, like, start_sum(node, like, grads)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.node, ctx.like, *grads = inputs
        ctx.dtypes = [None if g is None else g.dtype for g in grads]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        back = _call(_Gather, replace(ctx.node, call=None), None, *grads)
        fit = (None if y is None or t is None else y.to(t) for y, t in zip(back, ctx.dtypes, strict=True))
        return None, None, *fit
