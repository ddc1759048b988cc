"""Who writes what: every rank offers the parts it holds, and rank 0 gives each part to one of those that hold it.

rank 0 (dp 0, tp 0)   embed rows 0-3    norm            rank 0 writes embed rows 0-3
rank 1 (dp 0, tp 1)   embed rows 4-7    norm            rank 1 writes embed rows 4-7
rank 2 (dp 1, tp 0)   embed rows 0-3    norm            rank 2 writes norm: it had the least to write
rank 3 (dp 1, tp 1)   embed rows 4-7    norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.place import places
from fstep.state.parts import Part, check_cover, part_of
from fstep.tree import tree_leaves, tree_paths


@dataclass(frozen=True)
class Offer:
    """A part of a leaf that a rank holds."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole
    part: Part


@dataclass(frozen=True)
class Share:
    """A leaf as all ranks hold it together: its parts, and for each the rank that gives it. ``everywhere``: all hold all."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[int, Part], ...]
    everywhere: bool


def named_tensors(who: str, argument: str, tree: Any, *, error: type[Exception]) -> dict[str, Tensor]:
    """Return the leaves of a tree by their paths; raise if one is no tensor or two have one path."""
    named: dict[str, Tensor] = {}
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if not isinstance(leaf, Tensor):
            raise error(
                f"{who}: {argument} has a {type(leaf).__name__} at {path!r}; make it a tensor, or a static field if it "
                "is part of the structure"
            )
        if path in named:
            raise error(f"{who}: {argument} has two leaves with the path {path!r}; use keys without dots")
        named[path] = leaf
    return named


def offers(who: str, argument: str, tree: Any, *, error: type[Exception]) -> dict[str, Offer]:
    """Return what a rank holds, by paths in the order of `tree_leaves`."""
    named = named_tensors(who, argument, tree, error=error)
    found = {}
    for (path, x), place in zip(named.items(), places(tree), strict=True):
        part = part_of(place)
        if tuple(x.shape) != part.shape:
            raise error(
                f"{who}: {argument} has a tensor {tuple(x.shape)} at {path!r}, inside nodes that say it is {part.shape} of "
                f"{place.shape}; map functions over trees that keep shapes"
            )
        found[path] = Offer(path, x.dtype, place.shape, part)
    return found


def assign(who: str, heard: Sequence[dict[str, Offer]], *, error: type[Exception]) -> dict[str, Share]:
    """Give every part of every leaf to one of the ranks that hold it, the one with the least to do so far.

    Raises unless the parts of each leaf are together the whole, once.
    """
    first: dict[str, tuple[int, Offer]] = {}
    holders: dict[str, dict[Part, list[int]]] = {}
    for rank, own in enumerate(heard):
        for path, offer in own.items():
            seen, known = first.setdefault(path, (rank, offer))
            if (offer.dtype, offer.shape) != (known.dtype, known.shape):
                raise error(
                    f"{who}: leaf {path!r} is {known.dtype} {known.shape} on rank {seen}, and {offer.dtype} {offer.shape} "
                    f"on rank {rank}; make the state with the same config on every rank"
                )
            holders.setdefault(path, {}).setdefault(offer.part, []).append(rank)
    load = [0] * len(heard)
    shares = {}
    for path, held in holders.items():
        _, known = first[path]
        if wrong := check_cover(known.shape, held):
            raise error(
                f"{who}: the ranks do not hold leaf {path!r} {known.shape} once: {wrong}; pass the mesh it lives on, on all "
                "its ranks"
            )
        parts = []
        for part, ranks in sorted(held.items(), key=lambda item: (item[0].box, item[0].span)):
            if part.size or len(held) == 1:  # an empty part of something says nothing
                rank = min(ranks, key=lambda r: (load[r], r))
                load[rank] += part.size * known.dtype.itemsize
                parts.append((rank, part))
        everywhere = len(parts) == 1 and len(held[parts[0][1]]) == len(heard)
        shares[path] = Share(known.dtype, known.shape, tuple(parts), everywhere)
    return shares
