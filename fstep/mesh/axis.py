"""Axes of ranks. A function that communicates takes ``axis=``; an axis of size 1 is the identity.

    Mesh()                      pp 1   dp 1   cp 1   tp 1   ep 1        one process

The names are a convention every part of fstep shares: ``pp`` pipeline stages, ``dp`` documents, ``cp`` chunks of one
document, ``tp`` slices of one weight, ``ep`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Axis:
    """A named group of ranks: how many there are and which one this is.

    >>> import fstep
    >>> fstep.Axis("cp").size
    1
    """

    name: str
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Axis: size of {self.name!r} is {self.size}; pass 1 or more")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"Axis: rank {self.rank} of {self.name!r} is outside 0..{self.size - 1}")


@dataclass(frozen=True)
class Mesh:
    """The axes a step runs over. `Mesh()` is one process: every axis has size 1.

    >>> import fstep
    >>> mesh = fstep.Mesh()
    >>> mesh.pp.size, mesh.cp.size
    (1, 1)
    """

    pp: Axis = field(default=Axis("pp"))
    dp: Axis = field(default=Axis("dp"))
    cp: Axis = field(default=Axis("cp"))
    tp: Axis = field(default=Axis("tp"))
    ep: Axis = field(default=Axis("ep"))


def require_single(function: str, axis: Axis) -> None:
    """Refuse an axis that this release cannot communicate over."""
    if axis.size != 1:
        raise NotImplementedError(
            f"{function}: axis {axis.name!r} has size {axis.size}, and this release runs in one process; use Mesh()"
        )
