"""Params as Hugging Face tensors, one whole tensor at a time, from wherever their parts are.

    pp 0, tp 0   q0[:2]  ─┐
    pp 0, tp 1   q0[2:]  ─┴─►  q0  ─┐
    pp 1, tp 0   q1[:2]  ─┐         ├─►  every rank (`stream_hf`), or the one that writes (`save_hf`): q0, then q1
    pp 1, tp 1   q1[2:]  ─┴─►  q1  ─┘

The order is that of the whole model's spec, so it is the same on every mesh.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.axis import Axis, Mesh
from fstep.mesh.exchange import transport
from fstep.state.agree import all_ranks, consult
from fstep.state.files import listed
from fstep.state.hf_folder import WeightsError
from fstep.state.offers import Offer, Share, assign, offers
from fstep.state.parts import Part
from fstep.state.spec import HFTensor, spec_leaves
from fstep.tree import tree_leaves


def stream_hf(params: Any, spec: Any, *, mesh: Mesh = Mesh()) -> Iterator[tuple[str, Tensor]]:  # noqa: B008
    """Yield ``(Hugging Face name, tensor)`` for each leaf of ``spec``, in their order; nothing for what is tied.

    On a mesh every rank calls it with its own params and gets every tensor whole: params may be shards over any axis
    (stages, tensor slices, ZeRO) or replicated, what comes out is replicated over all. Tensors come one by one; the memory
    is that of one tensor and of the part on its way, on the params' device. All ranks have to go through to the end, in
    step; who needs a few tensors only drops the others.

    Args:
        params: this rank's params.
        spec: the spec of the whole model, the same on every rank.
        mesh: the mesh whose ranks call this. On one rank the tensors are the params' own, not copied.

    Tensors are detached. Raises `WeightsError` at once, on every rank, if the params of all ranks together lack a leaf of
    ``spec``, have one more, or have one of another shape.

    >>> import torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,)), "head": fstep.Tied("w")}
    >>> list(fstep.stream_hf({"w": torch.ones(2), "head": fstep.Tied("w")}, spec))
    [('linear.weight', tensor([1., 1.]))]
    """
    everyone = all_ranks("stream_hf", mesh)
    shares = survey("stream_hf", params, spec, everyone, lambda leaf, x: None)
    return deliver("stream_hf", params, spec, shares, everyone, to_all=True)


def survey(
    who: str, params: Any, spec: Any, everyone: Axis, check: Callable[[HFTensor, Tensor], None]
) -> Mapping[str, Share]:
    """Find out who holds what. ``check`` looks at each of this rank's leaves. Collective, and so are its errors."""

    def ask() -> tuple[int, dict[str, Offer]]:
        leaves = spec_leaves(who, spec)
        held = offers(who, "params", params, error=WeightsError)
        for (path, offer), x in zip(held.items(), tree_leaves(params), strict=True):
            if path in leaves and offer.shape != tuple(leaves[path].shape):
                raise WeightsError(
                    f"{who}: params leaf {path!r} has the shape {offer.shape}, spec says {tuple(leaves[path].shape)} for "
                    f"{leaves[path].name!r}; make spec with the config of these params"
                )
            if path in leaves:
                check(leaves[path], x)
        return zlib.crc32(repr(leaves).encode()), held

    def decide(heard: list[tuple[int, dict[str, Offer]]]) -> list[Mapping[str, Share]]:
        odd = next((rank for rank, (mark, _) in enumerate(heard) if mark != heard[0][0]), 0)
        if odd:
            raise WeightsError(
                f"{who}: rank {odd} has another spec than rank 0; pass the spec of the whole model, as on Mesh(), on "
                "every rank"
            )
        leaves, values = spec_leaves(who, spec), {path for _, held in heard for path in held}
        missing, extra = [p for p in leaves if p not in values], sorted(p for p in values if p not in leaves)
        if missing or extra:
            raise WeightsError(
                f"{who}: "
                + (f"params have no leaf {listed(missing)}, which spec has; " if missing else "")
                + (f"spec has no leaf {listed(extra)}, which params have; " if extra else "")
                + "make spec with the config of these params, and merge adapters first"
                + ("; pass mesh= if other ranks have the rest" if missing and len(heard) == 1 else "")
            )
        return [assign(who, [held for _, held in heard], error=WeightsError)] * len(heard)

    return consult(who, everyone, ask, decide, error=WeightsError)


def deliver(
    who: str, params: Any, spec: Any, shares: Mapping[str, Share], everyone: Axis, *, to_all: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on every rank, or on rank 0 alone; the others then yield nothing, and send what they have."""
    held = offers(who, "params", params, error=WeightsError)
    mine = {path: x.detach() for path, x in zip(held, tree_leaves(params), strict=True)}
    device = next((x.device for x in mine.values()), torch.device("cpu"))

    me = everyone.rank

    def get(path: str, src: int, part: Part) -> Tensor:
        share = shares[path]
        if share.everywhere:
            return mine[path]
        lines = transport(who, everyone)
        if to_all:
            own = mine[path].contiguous() if src == me else torch.empty(part.shape, dtype=share.dtype, device=device)
            return lines.broadcast(own, src, action=who).wait()
        return mine[path] if src == me else lines.recv(src, part.shape, share.dtype, channel="forward").wait()

    for path, leaf in spec_leaves(who, spec).items():
        share = shares[path]
        if to_all or me == 0:
            yield leaf.name, _join(share, functools.partial(get, path), device)
        elif not share.everywhere and any(src == me for src, _ in share.parts):
            transport(who, everyone).send(mine[path].contiguous(), 0, channel="forward").wait()


def _join(share: Share, get: Callable[[int, Part], Tensor], device: torch.device) -> Tensor:
    """Put the parts of a tensor together, as each arrives."""
    if len(share.parts) == 1:
        return get(*share.parts[0]).reshape(share.shape)
    out = torch.empty(share.shape, dtype=share.dtype, device=device)
    for box, parts in itertools.groupby(share.parts, lambda item: item[1].box):
        extents = Part(box).extents
        here = out[tuple(slice(*span) for span in box)]
        ranges = list(parts)
        if len(ranges) == 1:
            here.copy_(get(*ranges[0]).reshape(extents))
            continue
        flat = torch.empty(Part(box).size, dtype=share.dtype, device=device)
        for src, part in ranges:
            flat[slice(*part.span)] = get(src, part)
        here.copy_(flat.view(extents))
    return out
