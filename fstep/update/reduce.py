"""Adding gradients up over the mesh, and measuring them, each parameter once.

                     dp, cp                  pp                          tp
    plain leaf       partial: added up       another parameter           the same on all ranks
    Shard            partial: added up       another parameter           another part, complete
    Copied           partial: added up       the copies are added up     (what it wraps)
    ZeRO piece       another part, complete  another parameter           (what it wraps)

All of it is read off the params tree, by `places`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fstep.mesh import exchange
from fstep.mesh.axis import Axis, Mesh
from fstep.mesh.place import Copied, Place
from fstep.update.finite import leaf_norms

DATA = ("dp", "cp")  # along these ranks see other tokens with the same parameters
BUCKET_BYTES = 1 << 26


def sum_gradients(leaves: Sequence[Tensor], places: Sequence[Place], mesh: Mesh) -> list[Tensor]:
    """Return each gradient summed over the ranks that computed a part of it."""
    out = list(leaves)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, place in enumerate(places):
        cut = {name for axis in place.axes for name in axis.name.split("+")}
        groups.setdefault(tuple(name for name in DATA if name not in cut), []).append(i)
    # In an order that all ranks share: what they hold differs, what they sum over does not.
    for names in ((*DATA,), DATA[:1], DATA[1:]):
        if names in groups:
            axis = mesh.over(*names)
            if axis.size > 1:
                members = groups[names]
                for bucket in _buckets([out[i] for i in members]):
                    chosen = [members[j] for j in bucket]
                    summed = _sum_flat([out[i] for i in chosen], [places[i].path for i in chosen], axis)
                    for i, x in zip(chosen, summed, strict=True):
                        out[i] = x
    # By name: where a rank has several stages, the order of its leaves is its own.
    for i in sorted(range(len(places)), key=lambda i: places[i].path):
        if (copies := places[i].copies) is not None:
            out[i] = _sum_copies(out[i], copies)
    return out


def _buckets(leaves: Sequence[Tensor]) -> Iterator[list[int]]:
    """Group leaves of one dtype, so that a model's many small gradients need few messages."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for i, x in enumerate(leaves):
        kind = (x.dtype, x.device)
        if kind in open_buckets and sizes[kind] + x.nbytes > BUCKET_BYTES:
            yield open_buckets.pop(kind)
            sizes[kind] = 0
        open_buckets.setdefault(kind, []).append(i)
        sizes[kind] = sizes.get(kind, 0) + x.nbytes
    yield from open_buckets.values()


def _sum_flat(leaves: Sequence[Tensor], names: Sequence[str], axis: Axis) -> list[Tensor]:
    """Add up some leaves in one message, whose title lets ranks see whether they mean the same leaves."""
    title = f"psum of the gradients {names[0]!r} to {names[-1]!r} ({zlib.crc32('|'.join(names).encode()):08x})"
    if len(leaves) == 1:
        return [psum(leaves[0], axis, title)]
    flat = psum(torch.cat([x.reshape(-1) for x in leaves]), axis, title)
    parts = torch.split_with_sizes(flat, [x.numel() for x in leaves])
    return [part.view(x.shape) for part, x in zip(parts, leaves, strict=True)]


def psum(x: Tensor, axis: Axis, title: str) -> Tensor:
    """Add up over an axis under a title that the ranks compare."""
    if axis.size == 1:
        return x
    return exchange.psum(x if torch.is_grad_enabled() else x.detach(), axis, title)


def _sum_copies(x: Tensor, copies: Copied) -> Tensor:
    """Add up a parameter's gradients on the stages that hold it, in their order: all get the same bits."""
    if x.requires_grad:
        raise ValueError(
            "finalize_grads: an outer derivative is being taken through a parameter that several stages hold; detach grads"
        )
    line, me = exchange.transport("finalize_grads", copies.axis), copies.ranks.index(copies.axis.rank)
    up, down = copies.ranks[me + 1 : me + 2], copies.ranks[:me][-1:]
    # Up along the copies and back: two ranks that both send first would wait for each other.
    total = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    for r in down:
        total = line.recv(r, total.shape, total.dtype, channel="forward").wait() + total
    for r in up:
        line.send(total, r, channel="forward").wait()
    total = total.to(x.dtype)
    for r in up:
        total = line.recv(r, x.shape, x.dtype, channel="backward").wait()
    for r in down:
        line.send(total, r, channel="backward").wait()
    return total


def norm_over_mesh(mine: Sequence[Tensor], mesh: Mesh, like: Tensor) -> Tensor:
    """Return the norm of what all ranks count, in float32 or the dtype of ``like``: the same on all of them.

    The squares are added in float64, so that a float32 norm does not depend on how parameters are cut.
    """
    square = torch.zeros((), dtype=torch.float64, device=like.device)
    if mine:
        square = leaf_norms(mine, 2, dtype=torch.float64).to(like.device).square().sum()
    wide = torch.promote_types(like.dtype, torch.float32)  # of the loss: the ranks' own leaves may differ
    return psum(square, everybody(mesh), "psum of the norm").sqrt().to(wide)


def counted(leaves: Sequence[Tensor], places: Sequence[Place], mesh: Mesh) -> list[Tensor]:
    """Return the leaves that this rank counts: of ranks that hold the same elements, the first one does."""
    at_zero = {name for name in ("dp", "ep", "cp", "tp") if getattr(mesh, name).rank == 0}
    out = []
    for x, place in zip(leaves, places, strict=True):
        cut = {name for axis in place.axes for name in axis.name.split("+")}
        if {"dp", "ep", "cp", "tp"} <= at_zero | cut and place.counts:
            out.append(x)
    return out


def everybody(mesh: Mesh) -> Axis:
    """Return the axis of all ranks."""
    return mesh.over("pp", "dp", "ep", "cp", "tp")
