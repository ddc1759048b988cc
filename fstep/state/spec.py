"""Specs: which Hugging Face tensor each leaf of the params is.

    the whole model's spec                              the part of one rank: stage 1, second half of each matrix
    {"embed":  HFTensor("...embed_tokens.weight"),
     "layers": {0: {"q": HFTensor("...0...")},
                1: {"q": HFTensor("...1...")}},         {"layers": {1: {"q": Shard(HFTensor("...1..."), dim 0)}},
     "head":   HFTensor("lm_head.weight")}               "head": Shard(HFTensor("lm_head.weight"), dim 0)}

The shape of an `HFTensor` is that of the whole tensor in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fstep.mesh.place import Range, places
from fstep.state.hf_folder import WeightsError
from fstep.tree import tree_leaves, tree_paths


@dataclass(frozen=True)
class HFTensor:
    """A leaf of a spec: the tensor's name in a Hugging Face folder, and its shape there and in the params.

    Inside a `Shard` it is the whole tensor of which the params hold a part.

    >>> import fstep
    >>> spec = {"embed": fstep.HFTensor("model.embed_tokens.weight", (32, 8)), "head": fstep.Tied("embed")}
    >>> fstep.tree_leaves(spec)
    [HFTensor(name='model.embed_tokens.weight', shape=(32, 8))]
    """

    name: str
    shape: tuple[int, ...]


def spec_leaves(who: str, spec: Any) -> dict[str, HFTensor]:
    """Return the leaves of a spec by their paths; raise if one is something else or two have one name."""
    leaves = dict(zip(tree_paths(spec), tree_leaves(spec), strict=True))
    paths: dict[str, str] = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, HFTensor):
            raise WeightsError(f"{who}: spec has a {type(leaf).__name__} at {path!r}; make it an HFTensor(name, shape)")
        if leaf.name in paths:
            first = paths[leaf.name]
            raise WeightsError(f"{who}: spec has {leaf.name!r} at {first!r} and {path!r}; put Tied({first!r}) at {path!r}")
        paths[leaf.name] = path
    return leaves


def spec_boxes(who: str, spec: Any) -> list[tuple[Range, ...]]:
    """Return which elements of its tensor each leaf of a spec stands for, in the order of `tree_leaves`."""
    boxes = []
    for leaf, place in zip(tree_leaves(spec), places(spec), strict=True):
        inside = all(0 <= start <= stop <= n for (start, stop), n in zip(place.box, leaf.shape, strict=True))
        if place.shape != tuple(leaf.shape) or not inside or place.flat is not None:
            raise WeightsError(
                f"{who}: spec has {leaf.name!r} {tuple(leaf.shape)} inside nodes that take {place.box} of {place.shape}; "
                "give HFTensor the shape of the whole, and Shard a dim, span and of that fit it"
            )
        boxes.append(place.box)
    return boxes
