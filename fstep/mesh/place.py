"""Where a parameter lives, as nodes of the params tree. The name of a parameter is the same wherever it lives.

    params on one rank                      the same model cut over tp 2 and pp 2, on the last stage, second slice
    {"embed": E [V, d],                     {"embed": Copied(Shard(E[V/2:], dim 0), pp ranks 0 and 1),
     "layers": {0: {"q": Q0 [h, d]},
                1: {"q": Q1 [h, d]}},        "layers": {1: {"q": Shard(Q1[h/2:], dim 0)}},
     "norm": N,                              "norm": N,
     "head": Tied("embed")}                  "head": Tied("embed")}

`Shard` is a part of a parameter, `Copied` one that several stages hold, `Stages` what a rank with several stages holds. The
nodes add nothing to a path: gradients, optimizer state and checkpoints carry the same names on every mesh. `places` reads
all of it off a tree, for whoever sums, counts, saves or loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from fstep.mesh.axis import Axis
from fstep.tree import NAMESPACE, check_type, path_name, tree_leaves, tree_paths, tree_replace_leaves, unnamed_node

Range = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """A part of a parameter along one dimension: elements ``span`` of the ``of`` that the whole has.

    The ranks of ``axis`` hold the other parts, which may differ in size. Its gradient is a shard likewise, complete on the
    rank that holds it.

    >>> import torch, fstep
    >>> cut = lambda mesh: fstep.Shard.cut(torch.arange(4.0), axis=mesh.tp, dim=0)
    >>> [fstep.tree_paths({"w": part}) for part in fstep.simulate(cut, tp=2)]
    [['w'], ['w']]
    >>> [part.value for part in fstep.simulate(cut, tp=2)]
    [tensor([0., 1.]), tensor([2., 3.])]
    """

    value: Any
    axis: Axis
    dim: int
    span: Range
    of: int

    def __post_init__(self) -> None:
        check_type("Shard", "axis", self.axis, Axis, "an axis of the mesh, e.g. mesh.tp")
        start, stop = self.span
        shape = getattr(self.value, "shape", None)
        if not 0 <= start <= stop <= self.of or (shape is not None and not 0 <= self.dim < len(shape)):
            raise ValueError(
                f"Shard: elements {self.span} of {self.of} along dim {self.dim}, of a value of shape {shape}; pass the span "
                "that this rank holds, and a dim that the value has; or use Shard.cut"
            )
        if isinstance(self.value, Tensor) and self.value.shape[self.dim] != stop - start:
            raise ValueError(
                f"Shard: the value has {self.value.shape[self.dim]} elements along dim {self.dim}, and span {self.span} is "
                f"{stop - start}; pass the part that the span says, or use Shard.cut"
            )

    @staticmethod
    def cut(whole: Tensor, *, axis: Axis, dim: int) -> Any:
        """Return this rank's part of ``whole``, a copy; parts are even, the first ones larger by one where needed.

        On an axis of size 1 this is ``whole`` itself.
        """
        check_type("Shard.cut", "axis", axis, Axis, "an axis of the mesh, e.g. mesh.tp")
        if not -whole.dim() <= dim < whole.dim():
            raise ValueError(f"Shard.cut: there is no dim {dim} in shape {tuple(whole.shape)}; give one that it has")
        if axis.size == 1:
            return whole
        dim %= whole.dim()
        start, stop = even_span(whole.shape[dim], axis)
        return Shard(whole.narrow(dim, start, stop - start).clone(), axis, dim, (start, stop), whole.shape[dim])


@dataclass(frozen=True)
class Copied:
    """A parameter that several stages hold: ``ranks`` of ``axis``, in order, such as a tied embedding's first and last.

    Every copy's gradient is a partial sum; `finalize_grads` adds them up, so that the copies stay the same to the bit.

    >>> import torch, fstep
    >>> make = lambda mesh: fstep.Copied(torch.ones(2), mesh.pp, ranks=(0, 1))
    >>> [fstep.places({"embed": copy})[0].counts for copy in fstep.simulate(make, pp=2)]
    [True, False]
    """

    value: Any
    axis: Axis
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        check_type("Copied", "axis", self.axis, Axis, "an axis of the mesh, e.g. mesh.pp")
        ranks = list(self.ranks)
        if ranks != sorted(set(ranks)) or self.axis.rank not in ranks or not set(ranks) <= set(range(self.axis.size)):
            raise ValueError(
                f"Copied: ranks are {self.ranks}, on rank {self.axis.rank} of axis {self.axis.name!r} of size "
                f"{self.axis.size}; pass the ranks that hold the parameter, in order, this one among them"
            )


@dataclass(frozen=True)
class Stages:
    """The params of a rank that runs several stages of a pipeline: a subtree for each, by the stage's number.

    >>> import torch, fstep
    >>> params = fstep.Stages({0: {"embed": torch.ones(1), "layers": {0: torch.ones(1)}}, 2: {"layers": {2: torch.ones(1)}}})
    >>> fstep.tree_paths(params)
    ['embed', 'layers.0', 'layers.2']
    """

    parts: Mapping[int, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or not self.parts or not all(isinstance(s, int) for s in self.parts):
            raise TypeError(f"Stages: parts is {type(self.parts).__name__}; pass a dict of subtrees by the stages' numbers")
        seen: set[str] = set()
        for stage, part in self.parts.items():
            names = set(tree_paths(part))
            if both := sorted(names & seen):
                raise ValueError(
                    f"Stages: stage {stage} has {both[0]!r}, as an earlier stage has; put Tied({both[0]!r}) in its place"
                )
            seen |= names


def _wrap(cls: type, fields: Sequence[str]) -> None:
    """Register a node with one child, ``value``, and the other fields static."""

    def unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> Any:
        # Not through __init__, since what is mapped over a tree may return anything.
        node: Any = object.__new__(cls)
        for name, value in zip(("value", *fields), (*children, *context), strict=True):
            object.__setattr__(node, name, value)
        return node

    unnamed_node(cls, lambda x: ([x.value], tuple(getattr(x, name) for name in fields)), unflatten)


def _unflatten_stages(children: Iterable[Any], numbers: tuple[int, ...]) -> Stages:
    node = object.__new__(Stages)
    object.__setattr__(node, "parts", dict(zip(numbers, children, strict=True)))
    return node


_wrap(Shard, ("axis", "dim", "span", "of"))
_wrap(Copied, ("axis", "ranks"))
unnamed_node(Stages, lambda x: ([x.parts[s] for s in sorted(x.parts)], tuple(sorted(x.parts))), _unflatten_stages)


@dataclass(frozen=True)
class Place:
    """What a leaf of a tree is of the whole: its name, and which elements of the parameter it holds.

    The parameter has ``shape``; the leaf holds the elements of ``box`` (a span for each dimension) and, if ``flat`` is
    given, of these only that span, counted row by row. ``axes`` are those whose ranks hold other elements. ``copies`` are
    the axis and the ranks that hold the same elements in another stage.

    >>> import torch, fstep
    >>> make = lambda mesh: fstep.places({"w": fstep.Shard.cut(torch.ones(4, 2), axis=mesh.tp, dim=0)})[0].box
    >>> fstep.simulate(make, tp=2)
    [((0, 2), (0, 2)), ((2, 4), (0, 2))]
    """

    path: str
    shape: tuple[int, ...]
    box: tuple[Range, ...]
    flat: Range | None = None
    axes: tuple[Axis, ...] = ()
    copies: Copied | None = None

    def cut(self, whole: Tensor) -> Tensor:
        """Take these elements out of the whole parameter: a copy, or ``whole`` itself if that is what they are."""
        if tuple(whole.shape) != self.shape:
            raise ValueError(
                f"Place.cut: {self.path!r} has shape {tuple(whole.shape)}, and the whole one {self.shape}; pass the whole"
            )
        x = whole
        for dim, (start, stop) in enumerate(self.box):
            x = x.narrow(dim, start, stop - start)
        if self.flat is not None:
            x = x.reshape(-1)[self.flat[0] : self.flat[1]]
        return x if x.shape == whole.shape else x.clone(memory_format=torch.contiguous_format)

    @property
    def counts(self) -> bool:
        """Whether, of several copies, this is the one that is counted and saved."""
        return self.copies is None or self.copies.axis.rank == self.copies.ranks[0]


def even_span(length: int, axis: Axis) -> Range:
    """Return the part of ``length`` elements that is this rank's; the first parts are larger by one where needed."""
    small, more = divmod(length, axis.size)
    start = axis.rank * small + min(axis.rank, more)
    return start, start + small + (axis.rank < more)


def places(tree: Any) -> list[Place]:
    """Return the `Place` of every leaf of a tree of tensors, in the order of `tree_leaves`.

    >>> import torch, fstep
    >>> fstep.places({"w": torch.ones(2)})
    [Place(path='w', shape=(2,), box=((0, 2),), flat=None, axes=(), copies=None)]
    """
    found: list[Place] = []
    _visit(tree, (), [], found)
    return found


def _visit(tree: Any, above: tuple[Any, ...], inside: list[Any], found: list[Place]) -> None:
    def stop(x: Any) -> bool:
        return isinstance(x, Shard | Copied) or hasattr(x, "held")

    paths, leaves, _ = optree.tree_flatten_with_path(tree, stop, none_is_leaf=True, namespace=NAMESPACE)
    for path, leaf in zip(paths, leaves, strict=True):
        whole = (*above, *path)
        if hasattr(leaf, "held"):
            found += [replace(p, path=path_name((*whole, p.path))) for p in leaf.held(inside)]
        elif stop(leaf):
            _visit(leaf.value, whole, [*inside, leaf], found)
        elif leaf is not None:
            found.append(place_of(path_name(whole), tuple(leaf.shape), inside))


def place_of(path: str, shape: tuple[int, ...], inside: Sequence[Shard | Copied]) -> Place:
    """Return the place of a leaf that stands inside these nodes; ``shape`` is its own or, in a spec, the whole's."""
    full, box = list(shape), [(0, n) for n in shape]
    axes: list[Axis] = []
    copies = None
    for node in inside:
        if isinstance(node, Copied):
            copies = replace(node, value=None)
            continue
        full[node.dim], box[node.dim] = node.of, node.span
        axes.append(node.axis)
    return Place(path, tuple(full), tuple(box), None, tuple(axes), copies)


def cut_like(spec: Any, whole: Any) -> Any:
    """Cut a tree of whole parameters to the places that the nodes of ``spec`` say; what ``spec`` has not is left out.

    ``spec`` has a leaf with the whole's shape for each parameter (an `HFTensor`, say) inside `Shard`, `Copied` and `Stages`;
    the result has its structure. Parts are copies, so that the whole can be let go of; a leaf that is not cut is the same
    tensor. Raises ValueError for a leaf that ``whole`` has not, or has in another shape.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     spec = {"w": fstep.Shard(fstep.HFTensor("w", (4,)), mesh.tp, dim=0, span=(2, 4), of=4)}
    ...     return fstep.cut_like(spec, {"w": torch.arange(4), "other": torch.ones(1)})["w"].value
    >>> fstep.simulate(f, tp=2)[1]
    tensor([2, 3])
    """
    leaves = dict(zip(tree_paths(whole), tree_leaves(whole), strict=True))
    wanted = places(spec)
    for p in wanted:
        if p.path not in leaves:
            raise ValueError(f"cut_like: whole has no leaf {p.path!r}, which spec has; pass the params that spec is about")
    return tree_replace_leaves(spec, [p.cut(leaves[p.path]) for p in wanted])


def bare(tree: Any) -> Any:
    """Take the leaves of a tree out of their `Shard` and `Copied`: what a computation sees.

    >>> import torch, fstep
    >>> fstep.bare({"w": fstep.Copied(torch.ones(2), fstep.Axis("pp"), ranks=(0,))})
    {'w': tensor([1., 1.])}
    """

    def stop(x: Any) -> bool:
        return isinstance(x, Shard | Copied)

    leaves, spec = optree.tree_flatten(tree, stop, none_is_leaf=True, namespace=NAMESPACE)
    return optree.tree_unflatten(spec, [bare(x.value) if stop(x) else x for x in leaves])
