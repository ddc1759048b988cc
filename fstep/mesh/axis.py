"""Axes of ranks. A function that communicates takes ``axis=``; an axis of size 1 is the identity.

    Mesh()                      pp 1   dp 1   cp 1   tp 1   ep 1        one process

    pp 2, dp 2, tp 2:                 tp 0   tp 1
                        pp 0   dp 0      0      1
                               dp 1      2      3       the two ranks of a row are an axis tp; those of one column in
                        pp 1   dp 0      4      5       one stage are an axis dp; dp and tp together are four ranks
                               dp 1      6      7

The names are a convention every part of fstep shares: ``pp`` pipeline stages, ``dp`` documents, ``cp`` chunks of one
document, ``tp`` slices of one weight, ``ep`` experts. So is the order of ranks: those that exchange most are neighbours,
and neighbours sit on one host. It is the order of Megatron and of torchtitan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fstep.mesh.transport import Transport
from fstep.tree import check_type

# From the axis whose ranks are furthest apart to the one whose ranks are neighbours.
ORDER = ("pp", "dp", "ep", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """A named group of ranks: how many there are, which one this is, and how they talk.

    ``ranks`` are the numbers in the whole mesh of the ranks on this axis; ``transport`` moves tensors between them, and is
    ``None`` on an axis of size 1. Take larger axes from `simulate` or `mesh_from_env`.

    >>> import fstep
    >>> fstep.Axis("cp").size
    1
    >>> fstep.simulate(lambda mesh: mesh.dp, dp=2)[1]
    Axis(name='dp', size=2, rank=1, ranks=(0, 1))
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = ()
    transport: Transport | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Axis: size of {self.name!r} is {self.size}; pass 1 or more")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"Axis: rank {self.rank} of {self.name!r} is outside 0..{self.size - 1}")
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(self.size)))
        if len(set(self.ranks)) != self.size:
            raise ValueError(f"Axis: ranks of {self.name!r} are {self.ranks}; pass {self.size} different ones")


@dataclass(frozen=True)
class Mesh:
    """The axes a step runs over. `Mesh()` is one process: every axis has size 1.

    >>> import fstep
    >>> mesh = fstep.Mesh()
    >>> mesh.pp.size, mesh.cp.size
    (1, 1)
    >>> print(fstep.simulate(lambda mesh: mesh.draw(), pp=2, tp=2)[3])
    pp 2 x tp 2 = 4 ranks
          tp 0  tp 1
    pp 0     0     1
    pp 1     2   [3]
    """

    pp: Axis = field(default=Axis("pp"))
    dp: Axis = field(default=Axis("dp"))
    cp: Axis = field(default=Axis("cp"))
    tp: Axis = field(default=Axis("tp"))
    ep: Axis = field(default=Axis("ep"))

    def __post_init__(self) -> None:
        for name, axis in self._axes().items():
            check_type("Mesh", name, axis, Axis, "an Axis; simulate and mesh_from_env make meshes of any size")
            if axis.name != name:
                raise ValueError(f"Mesh: {name} is an axis named {axis.name!r}; pass {axis.name}= or name it {name!r}")

    def _axes(self) -> dict[str, Axis]:
        """Return the axes in the order of ranks."""
        axes: dict[str, Axis] = {name: getattr(self, name) for name in ORDER}
        return axes

    def _sizes(self) -> dict[str, int]:
        return {name: axis.size for name, axis in self._axes().items()}

    def _here(self) -> dict[str, int]:
        return {name: axis.rank for name, axis in self._axes().items()}

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self._sizes().values())

    @property
    def rank(self) -> int:
        """The number of this rank: pp counts slowest, then dp, ep, cp, and tp fastest."""
        return number(self._sizes(), self._here())

    def over(self, *names: str) -> Axis:
        """Return the axis of all ranks that differ in the named axes only: ``over("dp", "cp")`` sums over both at once.

        Its ranks are in the order of the mesh, whatever the order of the names. All of them have to call this, since the
        first use makes a group for them.
        """
        if not names or len(set(names)) != len(names) or not set(names) <= set(ORDER):
            raise ValueError(f"Mesh.over: {names} are not different axes of the mesh; pass some of {', '.join(ORDER)}")
        chosen = [axis for axis in self._axes().values() if axis.name in names]
        wide = [axis for axis in chosen if axis.size > 1] or chosen[:1]
        label = "+".join(axis.name for axis in chosen)
        ranks = along(self._sizes(), self._here(), names)
        first = wide[0].transport
        transport = first if len(wide) == 1 or first is None else first.regroup(label, ranks)
        return Axis(label, len(ranks), ranks.index(self.rank), ranks, transport)

    def draw(self) -> str:
        """Return a picture of the ranks, laid out by axis; this one is in brackets."""
        sizes = {name: size for name, size in self._sizes().items() if size > 1}
        if not sizes:
            return "1 rank"
        *rows, column = sizes
        width = max(len(f"{column} {sizes[column] - 1}"), len(f"[{self.size - 1}]"))
        title = " x ".join(f"{name} {size}" for name, size in sizes.items())
        heads = [f"{name} {sizes[name] - 1}" for name in rows]
        indent = "".join(" " * (len(head) + 2) for head in heads)
        lines = [f"{title} = {self.size} ranks"]
        lines.append(indent + "  ".join(f"{column} {i}".rjust(width) for i in range(sizes[column])))
        shown: list[int] | None = None
        for start in range(0, self.size, sizes[column]):
            where = coordinates(sizes, start)
            at = [where[name] for name in rows]
            # A coordinate is written where it, or one to its left, changes.
            changed = [shown is None or at[: i + 1] != shown[: i + 1] for i in range(len(at))]
            left = "".join(
                (f"{name} {i}" if new else "").ljust(len(head) + 2)
                for name, i, new, head in zip(rows, at, changed, heads, strict=True)
            )
            here = [f"[{r}]" if r == self.rank else str(r) for r in range(start, start + sizes[column])]
            lines.append(left + "  ".join(r.rjust(width) for r in here))
            shown = at
        return "\n".join(lines)


def number(sizes: Mapping[str, int], where: Mapping[str, int]) -> int:
    """Turn coordinates into a rank."""
    rank = 0
    for name, size in sizes.items():
        rank = rank * size + where[name]
    return rank


def coordinates(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """Turn a rank into its coordinates."""
    where = {}
    for name in reversed(list(sizes)):
        rank, where[name] = divmod(rank, sizes[name])
    return {name: where[name] for name in sizes}


def along(sizes: Mapping[str, int], where: Mapping[str, int], names: Sequence[str]) -> tuple[int, ...]:
    """Return the ranks whose coordinates are ``where``, except along ``names``, in order."""
    return tuple(
        rank
        for rank in range(math.prod(sizes.values()))
        if all(name in names or at == where[name] for name, at in coordinates(sizes, rank).items())
    )


def describe(sizes: Mapping[str, int], rank: int) -> str:
    """Name a rank for an error message: ``rank 5 (pp 1, dp 0, tp 1)``."""
    inside = ", ".join(f"{name} {at}" for name, at in coordinates(sizes, rank).items() if sizes[name] > 1)
    return f"rank {rank} ({inside})" if inside else f"rank {rank}"


def make_mesh(sizes: Mapping[str, int], rank: int, connect: Callable[[str, tuple[int, ...]], Transport]) -> Mesh:
    """Build the mesh of one rank; ``connect(name, ranks)`` makes the transport of an axis."""
    where = coordinates(sizes, rank)
    axes = {}
    for name in ORDER:
        ranks = along(sizes, where, (name,))
        transport = connect(name, ranks) if len(ranks) > 1 else None
        axes[name] = Axis(name, len(ranks), where[name], ranks, transport)
    return Mesh(**axes)


def check_sizes(function: str, **sizes: int) -> dict[str, int]:
    """Return the sizes in the order of ranks, or say which one is no size."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{function}: {name} is {size!r}; pass a number of ranks, 1 or more")
    return {name: sizes[name] for name in ORDER}


def check_axis(function: str, axis: object) -> None:
    """Refuse what is no axis: a name, a number or a whole mesh."""
    check_type(function, "axis", axis, Axis, "an axis of the mesh, e.g. mesh.dp")


def require_single(function: str, axis: Axis) -> None:
    """Refuse an axis that this release cannot communicate over.

    >>> import fstep
    >>> fstep.require_single("my_function", fstep.Mesh().tp)
    """
    if axis.size != 1:
        raise NotImplementedError(
            f"{function}: axis {axis.name!r} has size {axis.size}, and this function does not communicate over it yet; give "
            "its ranks to another axis, e.g. dp"
        )
