"""A ZeRO node: the parameters of one unit (a layer, say) laid end to end, cut in equal parts, of which each rank has one.

    whole   |  norm  |          q           |    up     | pad |        one flat buffer for each dtype of the unit
    ranks   |       0       |       1       |       2         |
    rank 1's leaves     norm []   q [5..12]   up [0..3]                views of its part; a piece may be empty

The tree inside the node is that of the unit, with a 1-D piece in place of each parameter: a piece has the parameter's name,
so that optimizer state, freezing and checkpoints by name see nothing new. What follows here is arithmetic on the flat
buffer and the two moves, each begun and finished apart: all ranks' parts gathered, gradients summed and scattered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import optree
import torch
from torch import Tensor

from fstep.mesh.axis import Axis
from fstep.mesh.place import Place, Range, places
from fstep.mesh.transport import Pending, Transport
from fstep.tree import NAMESPACE, unnamed_node

# Parameters and parts begin at multiples of so many elements, since kernels are slower on memory that is not aligned.
ALIGN = 16


@dataclass(frozen=True)
class Slot:
    """Where a parameter is: its shape, which flat buffer it is in, and at which element of that it begins."""

    shape: tuple[int, ...]
    group: int
    start: int

    @property
    def stop(self) -> int:
        """The element behind its last."""
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class Pieces:
    """A unit of parameters of which this rank holds a part: the ZeRO node. `shard_params` makes it.

    ``value`` is the unit's tree with this rank's 1-D piece of each parameter. ``axis`` has the ranks that hold the other
    parts, ``slots`` says of each leaf where in the flat buffers it is, and ``parts`` how many elements of each buffer a rank
    holds. ``dtype`` is what is gathered, ``reduce_dtype`` what gradients are summed in (``None``: the pieces' own), ``sums``
    how often. ``call`` is what a call of `pp_forward_backward` has under way for this node.

    >>> import torch, fstep
    >>> params = {"layers": {0: {"norm": torch.ones(8), "q": torch.ones(4, 8)}}}
    >>> zero = fstep.simulate(lambda mesh: fstep.shard_params(params, mesh.dp), dp=2)[1]
    >>> isinstance(zero["layers"][0], fstep.Pieces), fstep.tree_paths(zero)
    (True, ['layers.0.norm', 'layers.0.q'])
    >>> [len(x) for x in fstep.tree_leaves(zero)], fstep.places(zero)[1].flat
    ([0, 16], (16, 32))
    """

    value: Any
    axis: Axis
    slots: tuple[Slot | None, ...]
    parts: tuple[int, ...]
    dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    sums: str = "microbatch"
    call: Any = None  # a Call, inside one

    def span(self, slot: Slot, rank: int | None = None) -> Range:
        """Return the elements of a parameter that a rank holds, this one by default."""
        part = self.parts[slot.group]
        begin = (self.axis.rank if rank is None else rank) * part
        start, stop = max(begin, slot.start), min(begin + part, slot.stop)
        return (start - slot.start, stop - slot.start) if start < stop else (0, 0)

    def at(self, slot: Slot) -> slice:
        """Return where in this rank's part of its buffer the piece of a parameter is."""
        start, stop = self.span(slot)
        begin = max(slot.start - self.axis.rank * self.parts[slot.group], 0) if start < stop else 0
        return slice(begin, begin + stop - start)

    def leaves(self) -> list[Any]:
        """Return what is inside, ``None`` included: one for each slot."""
        found: list[Any] = optree.tree_leaves(self.value, none_is_leaf=True, namespace=NAMESPACE)
        return found

    def fill(self, leaves: Iterable[Any]) -> Any:
        """Return the unit's tree with other leaves."""
        spec = optree.tree_structure(self.value, none_is_leaf=True, namespace=NAMESPACE)
        return optree.tree_unflatten(spec, leaves)

    def held(self, inside: list[Any]) -> list[Place]:
        """Return the place of every leaf; ``inside`` are the nodes around this one."""
        some = [None if leaf is None else slot for leaf, slot in zip(self.leaves(), self.slots, strict=True)]
        tree = self.fill(some)
        for node in reversed(inside):
            tree = replace(node, value=tree)
        spans = [self.span(slot) for slot in some if slot is not None]
        return [
            replace(place, flat=span, axes=(*place.axes, self.axis)) for place, span in zip(places(tree), spans, strict=True)
        ]


def _flatten(node: Pieces) -> tuple[list[Any], Any]:
    return [node.value], (node.axis, node.slots, node.parts, node.dtype, node.reduce_dtype, node.sums, node.call)


def _unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> Pieces:
    return Pieces(*children, *context)


unnamed_node(Pieces, _flatten, _unflatten)


def is_pieces(x: Any) -> bool:
    """Say whether a value is a ZeRO node, where tree functions stop."""
    return isinstance(x, Pieces)


def lay_out(leaves: Sequence[Tensor | None], size: int) -> tuple[tuple[Slot | None, ...], tuple[int, ...]]:
    """Lay parameters end to end, those of one dtype in one buffer; return their slots, and each rank's part of a buffer."""
    dtypes: list[torch.dtype] = []
    ends: list[int] = []
    slots: list[Slot | None] = []
    for leaf in leaves:
        if leaf is None:
            slots.append(None)
            continue
        if leaf.dtype not in dtypes:
            dtypes.append(leaf.dtype)
            ends.append(0)
        group = dtypes.index(leaf.dtype)
        slots.append(Slot(tuple(leaf.shape), group, ends[group]))
        ends[group] = _align(slots[-1].stop)  # type: ignore[union-attr]
    return tuple(slots), tuple(_align(-(-end // size)) for end in ends)


def _align(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def copy_into(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy and convert many tensors at once."""
    if targets:
        torch._foreach_copy_(targets, sources)


def _transport(node: Pieces, action: str) -> Transport:
    if node.axis.transport is None:
        raise ValueError(
            f"{action}: axis {node.axis.name!r} has {node.axis.size} ranks and no transport between them; use these params "
            "inside simulate() or with the mesh of mesh_from_env()"
        )
    return node.axis.transport


Gathering = list[Pending[Tensor] | None]


def as_it_is(node: Pieces) -> Pieces:
    """Return a node without its call if it holds other pieces than the call's own: what was computed from them, say."""
    if node.call is None or all(a is b for a, b in zip(node.leaves(), node.call.leaves, strict=True)):
        return node
    return replace(node, call=None)


def start_gather(node: Pieces, leaves: Sequence[Tensor | None], dtype: torch.dtype | None) -> Gathering:
    """Begin to gather the buffers of a node from everybody's ``leaves``, floating-point ones in ``dtype``."""
    started: Gathering = []
    for group, part in enumerate(node.parts):
        mine = [(x, s) for x, s in zip(leaves, node.slots, strict=True) if x is not None and s and s.group == group]
        if not mine:
            started.append(None)
            continue
        first = mine[0][0]
        wide = dtype if dtype is not None and first.is_floating_point() else first.dtype
        send = torch.empty(part, dtype=wide, device=first.device)
        some = [(send[node.at(s)], x) for x, s in mine if x.numel()]
        copy_into([a for a, _ in some], [x for _, x in some])
        started.append(_transport(node, "gather_params").all_gather(send, action="gather_params"))
    return started


def wholes(node: Pieces, leaves: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return every parameter of which there is a piece, as a view of the gathered buffers [size, part]."""
    flat = [None if b is None else b.view(-1) for b in buffers]
    found: list[Tensor | None] = []
    for slot, leaf in zip(node.slots, leaves, strict=True):
        buffer = None if slot is None or leaf is None else flat[slot.group]
        found.append(None if slot is None or buffer is None else buffer[slot.start : slot.stop].view(slot.shape))
    return found


def start_sum(node: Pieces, like: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> Gathering:
    """Begin to sum gradients of whole parameters over the ranks and to scatter them.

    ``like`` has the piece of every parameter whose gradient is wanted, ``None`` for the others, which take no room in what
    is sent. A wanted gradient that is ``None`` is zero.
    """
    started: Gathering = []
    for group, part in enumerate(node.parts):
        wanted = [
            (slot, x, g)
            for slot, x, g in zip(node.slots, like, grads, strict=True)
            if slot is not None and slot.group == group and x is not None
        ]
        if not wanted:
            started.append(None)
            continue
        filled = [0] * node.axis.size
        moves = []
        for slot, _, grad in wanted:
            for rank in range(slot.start // part, -(-slot.stop // part)) if slot.stop > slot.start else ():
                start, stop = node.span(slot, rank)
                moves.append((rank, filled[rank], grad, start, stop))
                filled[rank] += stop - start
        first = wanted[0][1]
        rows = torch.empty(node.axis.size, max(filled), dtype=node.reduce_dtype or first.dtype, device=first.device)
        for rank, at, grad, start, stop in moves:
            if grad is None:
                rows[rank, at : at + stop - start] = 0
        some = [(rows[r, at : at + b - a], g.reshape(-1)[a:b]) for r, at, g, a, b in moves if g is not None]
        copy_into([target for target, _ in some], [source for _, source in some])
        action = "gradient of gather_params"
        started.append(_transport(node, action).reduce_scatter(rows, action=action))
    return started


def finish_sum(node: Pieces, like: Sequence[Tensor | None], started: Gathering) -> list[Tensor | None]:
    """Wait for what `start_sum` began, and return this rank's piece of each gradient, in the dtype of the parameter's."""
    done = [None if pending is None else pending.wait() for pending in started]
    at = [0] * len(done)
    found: list[Tensor | None] = []
    for slot, x in zip(node.slots, like, strict=True):
        total = None if slot is None or x is None else done[slot.group]
        if slot is None or x is None or total is None:
            found.append(None)
            continue
        total = done[slot.group] = total.to(x.dtype)
        found.append(total[at[slot.group] : at[slot.group] + x.numel()])
        at[slot.group] += x.numel()
    return found
