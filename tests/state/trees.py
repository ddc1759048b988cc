"""A small state, whole and as the ranks of any mesh hold it. Cut by hand, with plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fstep
from fstep import Copied, Key, Mesh, Place, Shard, Stages, Tied
from fstep.mesh.place import places
from fstep.tree import pytree, tree_leaves, tree_map, tree_paths, unnamed_node

LAYERS = 4


@pytree
class Run:
    """As much of a training state as a toy needs."""

    params: Any
    momentum: Any
    step: Tensor
    key: Key


def bits(x: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    # Through a list of untyped bytes, so not through the code that is tested.
    return x.dtype, tuple(x.shape), bytes(x.detach().clone(memory_format=torch.contiguous_format).untyped_storage())


def assert_same_bits(a: Any, b: Any) -> None:
    assert tree_paths(a) == tree_paths(b)
    for path, x, y in zip(tree_paths(a), tree_leaves(a), tree_leaves(b), strict=True):
        assert bits(x) == bits(y), path


@dataclass(frozen=True)
class Flat:
    """ZeRO by hand: of each leaf the elements from ``ends[rank]`` to ``ends[rank + 1]``, as fractions of it."""

    value: Any
    shapes: tuple[tuple[int, ...], ...]
    rank: int
    ends: tuple[float, ...]

    def span(self, shape: tuple[int, ...]) -> tuple[int, int]:
        n = torch.Size(shape).numel()
        return int(n * self.ends[self.rank]), int(n * self.ends[self.rank + 1])

    def held(self, inside: list[Any]) -> list[Place]:
        assert not inside
        whole = places(fill(self.value, self.shapes))
        return [replace(p, flat=self.span(s)) for p, s in zip(whole, self.shapes, strict=True)]


def fill(tree: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    return fstep.tree_replace_leaves(tree, [torch.empty(s, device="meta") for s in shapes])


unnamed_node(
    Flat,
    lambda x: ([x.value], (x.shapes, x.rank, x.ends)),
    lambda children, rest: Flat(*children, *rest),
)


def zero_by_hand(*ends: float) -> Callable[[Any, Mesh], Any]:
    """Cut every layer over dp, in parts as uneven as ``ends``; what is outside of layers stays whole."""

    def cut(tree: Any, mesh: Mesh) -> Any:
        def layer(unit: Any) -> Any:
            shapes = tuple(tuple(x.shape) for x in tree_leaves(unit))
            flat = Flat(unit, shapes, mesh.dp.rank, (0.0, *ends, 1.0))
            return replace(flat, value=tree_map(lambda x: x.reshape(-1)[slice(*flat.span(tuple(x.shape)))].clone(), unit))

        return {**tree, "layers": {i: layer(unit) for i, unit in tree["layers"].items()}}

    return cut


def zero(tree: Any, mesh: Mesh) -> Any:
    return fstep.shard_params(tree, mesh.over("dp", "cp"))


def params(seed: int = 0, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    def draw(i: int, *shape: int) -> Tensor:
        return Key.seed(seed).fold_in(i).normal(shape, dtype=dtype)

    def layer(i: int) -> Any:
        return {
            "q": draw(10 * i, 6, 4),
            "o": draw(10 * i + 1, 4, 6),
            "norm": draw(10 * i + 2, 4),
            "b": draw(10 * i + 3, 3, 2, 5),
        }

    return {
        "embed": draw(100, 7, 4),
        "layers": {i: layer(i) for i in range(LAYERS)},
        "norm": draw(101, 4),
        "head": Tied("embed") if tied else draw(102, 7, 4),
    }


DIMS = {"q": 0, "o": 1, "b": 2, "embed": 0, "head": 0}


def on_rank(tree: Any, mesh: Mesh, *, stages: int = 1, zero: Any = None) -> Any:
    """Take a rank's part of a params-shaped tree; a rank of pp has ``stages`` stages."""

    def tensor(name: str, x: Any) -> Any:
        if name not in DIMS or mesh.tp.size == 1:
            return x
        dim, n, tp = DIMS[name], x.shape[DIMS[name]], mesh.tp
        ends = [n * r // tp.size for r in range(tp.size + 1)]
        a, b = ends[tp.rank], ends[tp.rank + 1]
        index = (slice(None),) * dim + (slice(a, b),)
        return Shard(x[index].clone(), tp, dim, (a, b), n)

    count, pp = mesh.pp.size * stages, mesh.pp
    tied = isinstance(tree["head"], Tied)

    def stage(s: int) -> Any:
        each = LAYERS // count
        part: Any = {
            "layers": {i: {k: tensor(k, x) for k, x in tree["layers"][i].items()} for i in range(s * each, s * each + each)}
        }
        embed = tensor("embed", tree["embed"])
        apart = tied and count > 1 and (count - 1) % pp.size != 0
        if s == 0:
            part["embed"] = Copied(embed, pp, (0, (count - 1) % pp.size)) if apart else embed
        if s == count - 1:
            part["norm"] = tree["norm"]
            part["head"] = tree["head"] if tied else tensor("head", tree["head"])
            if apart:
                part["embed"] = Copied(embed, pp, (0, (count - 1) % pp.size))
        return part if zero is None else zero(part, mesh)

    mine = {s: stage(s) for s in range(count) if s % pp.size == pp.rank}
    return mine[pp.rank] if stages == 1 else Stages(mine)


def run(seed: int = 0, *, tied: bool = False) -> Run:
    momentum = params(seed + 1, tied=tied, dtype=torch.float64)
    momentum["norm"] = None  # frozen
    return Run(params(seed, tied=tied), momentum, torch.tensor(seed), Key.seed(seed))


@dataclass(frozen=True)
class Layout:
    """A mesh, and how a state lies on it."""

    name: str
    sizes: dict[str, int]
    stages: int = 1
    zero: Any = None

    def of(self, whole: Run, mesh: Mesh) -> Run:
        """Take this rank's part."""
        cut = lambda tree: on_rank(tree, mesh, stages=self.stages, zero=self.zero)  # noqa: E731
        return replace(whole, params=cut(whole.params), momentum=cut(whole.momentum))


LAYOUTS = [
    Layout("one", {}),
    Layout("tp2", {"tp": 2}),
    Layout("tp3", {"tp": 3}),
    Layout("pp2", {"pp": 2}),
    Layout("pp4", {"pp": 4}),
    Layout("pp2 tp2", {"pp": 2, "tp": 2}),
    Layout("dp2", {"dp": 2}),
    Layout("zero 2", {"dp": 2}, zero=zero_by_hand(0.4)),
    Layout("zero 4 with an empty rank", {"dp": 4}, zero=zero_by_hand(0.3, 0.3, 0.9)),
    Layout("interleaved", {"pp": 2}, stages=2),
    Layout("real zero 2", {"dp": 2}, zero=zero),
    Layout("real zero 3", {"dp": 3}, zero=zero),
    Layout("real zero 4, tp2", {"dp": 2, "cp": 2, "tp": 2}, zero=zero),
    Layout("pp2 dp2 tp2 zero", {"pp": 2, "dp": 2, "tp": 2}, zero=zero),
]
