"""What pipeline stages say to each other: trees of tensors, whose shapes may differ from one message to the next.

    sender    note: the tree with (shape, dtype, does it want a gradient?) in place of tensors      then the tensors
    receiver  reads the note, and then knows what to receive; the tensors come while it computes something else

Nothing is known beforehand and nothing remembered, so microbatches may be of any sizes. What has no elements is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.axis import Axis
from fstep.mesh.exchange import transport
from fstep.mesh.transport import Done, Pending
from fstep.ratio import Ratio
from fstep.tree import tree_leaves, tree_map, tree_replace_leaves

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Outline:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    wants_grad: bool


def _outline(x: Any) -> Any:
    return Outline(tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def device_of(*trees: Any) -> torch.device:
    """Return where the first tensor of some trees is."""
    return next((x.device for tree in trees for x in tensors_of(tree)), torch.device("cpu"))


def with_tensors(tree: Any, tensors: Sequence[Tensor | None]) -> Any:
    """Return the tree with its tensors replaced, in order."""
    new = iter(tensors)
    return tree_map(lambda x: next(new) if isinstance(x, Tensor) else x, tree)


def send_tree(tree: Any, what: str, dst: int, axis: Axis) -> list[Pending[Any]]:
    """Send a tree forward, its tensors detached; the tree must not change before everything returned was waited for."""
    line = transport("pp_forward_backward", axis)
    pending = [line.send_note((what, tree_map(_outline, tree)), dst, channel=FORWARD)]
    return pending + send_tensors(tensors_of(tree), dst, axis, FORWARD)


@dataclass(frozen=True)
class Coming:
    """A tree on its way: what it is made of is known, and its tensors are being received."""

    note: Any
    tensors: Sequence[Pending[Tensor]]

    def wait(self) -> tuple[Any, list[bool]]:
        """Return the tree, and for each of its tensors whether the sender wants its gradient."""
        tensors = iter(self.tensors)
        leaves = tree_leaves(self.note)
        tree = tree_replace_leaves(self.note, [next(tensors).wait() if isinstance(x, Outline) else x for x in leaves])
        return tree, [x.wants_grad for x in leaves if isinstance(x, Outline)]


def recv_tree(what: str, src: int, axis: Axis, device: torch.device) -> Coming:
    """Wait for the note of a tree, and start to receive its tensors."""
    line = transport("pp_forward_backward", axis)
    sent, note = line.recv_note(src, channel=FORWARD).wait()
    if sent != what:
        raise ValueError(
            f"pp_forward_backward: rank {src} of axis {axis.name!r} sends {sent} and rank {axis.rank} expects {what}; give "
            "all ranks of the axis the same number of microbatches and the same schedule"
        )
    kinds = [(x.shape, x.dtype) for x in tree_leaves(note) if isinstance(x, Outline)]
    return Coming(note, recv_tensors(kinds, src, axis, FORWARD, device))


def send_tensors(tensors: Sequence[Tensor], dst: int, axis: Axis, channel: str) -> list[Pending[Any]]:
    """Send tensors that the receiver knows the shapes of."""
    line = transport("pp_forward_backward", axis)
    return [line.send(x.detach().contiguous(), dst, channel=channel) for x in tensors if x.numel()]


def recv_tensors(
    kinds: Sequence[tuple[tuple[int, ...], torch.dtype]], src: int, axis: Axis, channel: str, device: torch.device
) -> list[Pending[Tensor]]:
    """Start to receive tensors of known shapes and dtypes."""
    line = transport("pp_forward_backward", axis)
    return [
        Done(torch.empty(shape, dtype=dtype, device=device)) if 0 in shape else line.recv(src, shape, dtype, channel=channel)
        for shape, dtype in kinds
    ]


def tell_all(note: Any, src: int, axis: Axis) -> Any:
    """Give every rank the small Python value that rank ``src`` has."""
    line = transport("pp_forward_backward", axis)
    if axis.rank != src:
        return line.recv_note(src, channel=FORWARD).wait()
    for pending in [line.send_note(note, r, channel=FORWARD) for r in range(axis.size) if r != src]:
        pending.wait()
    return note


def gather_notes(note: Any, axis: Axis) -> list[Any]:
    """Give every rank the small Python values of all, in order."""
    line = transport("pp_forward_backward", axis)
    if axis.rank:
        line.send_note(note, 0, channel=FORWARD).wait()
        return list(tell_all(None, 0, axis))
    return list(tell_all([note, *(line.recv_note(r, channel=FORWARD).wait() for r in range(1, axis.size))], 0, axis))


def sum_ratios(
    own: Mapping[str, Ratio], stage_of: Mapping[str, int], leaves: int, axis: Axis, device: torch.device
) -> dict[str, Ratio]:
    """Add up ratios by name over the ranks, each of which may have others; all get all of them, and the same bits.

    A name of ``stage_of`` is one quantity that several stages report a part of, each with the whole weight: its weights are
    not added, but taken from the first stage. ``leaves`` is how many leaves this rank trains: somebody should train one.
    """
    if axis.size == 1:
        return dict(own)
    mine = {n: (r.num.dtype, r.den.dtype, stage_of.get(n, -1)) for n, r in own.items()}
    kinds: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    first: dict[str, int] = {}
    notes = gather_notes((leaves, mine), axis)
    if not any(number for number, _ in notes):
        raise ValueError(
            "pp_forward_backward: no rank has a leaf that is trainable; `trainable` must be true for at least one path"
        )
    for _, theirs in notes:
        for name, (num, den, stage) in theirs.items():
            before = kinds.get(name, (num, den))
            kinds[name] = torch.promote_types(before[0], num), torch.promote_types(before[1], den)
            first[name] = min(first.get(name, stage), stage)
    zero = torch.zeros((), device=device)
    parts: dict[torch.dtype, list[Tensor]] = {}
    for name, (num_kind, den_kind) in kinds.items():
        num, den = (own[name].num, own[name].den) if name in own else (zero, zero)
        weighs = name in mine and mine[name][2] == first[name]
        parts.setdefault(num_kind, []).append(num.to(device, num_kind))
        parts.setdefault(den_kind, []).append((den if weighs else zero).to(device, den_kind))
    sums = {}
    for dtype in sorted(parts, key=str):
        # Whoever has nothing adds zero, so one stage's value arrives with its own bits.
        flat = torch.stack(parts[dtype])
        sums[dtype] = iter(transport("psum", axis).all_reduce(flat, action="psum of the loss").wait())
    return {name: Ratio(*(next(sums[dtype]) for dtype in pair)) for name, pair in kinds.items()}


def broadcast_results(results: Sequence[Any] | None, src: int, axis: Axis, device: torch.device) -> tuple[Any, ...]:
    """Give every rank the results of rank ``src``: one message for each dtype, however many results there are."""
    if axis.size == 1:
        assert results is not None
        return tuple(results)
    mine = [] if results is None else [x.detach() for x in tensors_of(list(results))]
    note = tell_all(None if results is None else tree_map(_outline, list(results)), src, axis)
    outlines = [x for x in tree_leaves(note) if isinstance(x, Outline)]
    line = transport("pp_forward", axis)
    flat: dict[torch.dtype, Tensor] = {}
    for dtype in sorted({o.dtype for o in outlines}, key=str):
        if axis.rank == src:
            flat[dtype] = torch.cat([x.reshape(-1) for x in mine if x.dtype == dtype]).to(device)
        else:
            flat[dtype] = torch.empty(
                sum(torch.Size(o.shape).numel() for o in outlines if o.dtype == dtype), dtype=dtype, device=device
            )
        if flat[dtype].numel():
            flat[dtype] = line.broadcast(flat[dtype], src, action="broadcast of results").wait()
    if axis.rank == src:
        assert results is not None
        return tuple(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, list(results)))
    at = dict.fromkeys(flat, 0)

    def take(o: Outline) -> Tensor:
        start = at[o.dtype]
        at[o.dtype] = start + torch.Size(o.shape).numel()
        return flat[o.dtype][start : at[o.dtype]].view(o.shape).clone()

    return tuple(tree_map(lambda x: take(x) if isinstance(x, Outline) else x, note))
