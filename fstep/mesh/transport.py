"""What moves plain tensors between the ranks of one axis. Three things do, and all code above them is the same:

    none        an axis of size 1: nothing moves, and no function asks
    threads     ranks are threads of this process (`simulate`)               threads.py
    processes   ranks are processes; torch.distributed moves (gloo, NCCL)    processes.py

A transport knows nothing of gradients; `collectives` adds them. Every operation starts at once and returns a `Pending`;
``wait()`` gives the result. That one word covers a gather that is started early and a message that is sent without waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T_co = TypeVar("T_co", covariant=True)

# A pipeline's two directions of traffic never wait for each other: NCCL delivers in order, channel by channel.
CHANNELS = ("forward", "backward")


class MeshError(RuntimeError):
    """Ranks could not talk: their calls do not match, nobody can go on, or one of them is gone.

    The message names the action, the axis and the ranks.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     if mesh.dp.rank == 0:
    ...         return fstep.psum(torch.ones(2), axis=mesh.dp)
    >>> try:
    ...     fstep.simulate(f, dp=2)
    ... except fstep.MeshError as error:
    ...     print(error)
    simulate: no rank can go on
      rank 0 (dp 0) is in psum over 'dp', waiting for rank 1 (dp 1), at ...
      rank 1 (dp 1) has returned
    """


class Pending(Protocol[T_co]):
    """Something under way. Whoever started it calls `wait`, once; until then the tensors given to it must not change."""

    def wait(self) -> T_co:
        """Wait until it is done, and return the result."""
        ...


class Transport(Protocol):
    """The ranks of one axis, numbered 0 to size - 1 here, and what they can do together.

    The first six are calls that every rank of the axis makes, in the same order, with tensors of one shape and dtype.
    ``action`` is what the user called, for messages. Results are new memory, and tensors that are sums are added in the
    order of ranks, except on NCCL, which has its own.
    """

    def all_gather(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        """Stack everybody's ``x``: [...] -> [size, ...]."""
        ...

    def all_to_all(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        """Give ``x[i]`` to rank i; ``result[i]`` came from rank i: [size, ...] -> [size, ...]."""
        ...

    def all_reduce(self, x: Tensor, *, action: str, op: str = "sum") -> Pending[Tensor]:
        """Add everybody's ``x``, or take the maximum with ``op="max"``; all ranks get the same bits."""
        ...

    def reduce_scatter(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        """Add everybody's ``x`` and return row ``rank`` of the sum: [size, ...] -> [...]."""
        ...

    def broadcast(self, x: Tensor, src: int, *, action: str) -> Pending[Tensor]:
        """Return what rank ``src`` gave."""
        ...

    def permute(self, x: Tensor, to: Sequence[int], *, action: str) -> Pending[Tensor]:
        """Give ``x`` to rank ``to[rank]``, where ``to`` is a permutation."""
        ...

    def connect(self, links: Sequence[tuple[str, int, int]]) -> None:
        """Get ready for messages on these links: channel, source, destination. All ranks name the same ones in one order.

        NCCL connects two ranks at their first message and makes both wait for each other, which in the middle of a pipeline
        could be in a circle.
        """
        ...

    def send(self, x: Tensor, dst: int, *, channel: str) -> Pending[None]:
        """Send without waiting; ``wait()`` returns when ``x`` may be reused. Messages of a channel arrive in order."""
        ...

    def recv(self, src: int, shape: Sequence[int], dtype: torch.dtype, *, channel: str) -> Pending[Tensor]:
        """Receive the next tensor from ``src``, whose shape and dtype the receiver knows. NCCL does not check them.

        Several receives from one rank may be started; on each channel they are waited for in that order.
        """
        ...

    def send_note(self, note: Any, dst: int, *, channel: str) -> Pending[None]:
        """Send a small Python value past the device: what shapes follow, for a receiver that cannot know.

        Receives of notes and of tensors are started in the order of sending, and may be waited for independently.
        """
        ...

    def recv_note(self, src: int, *, channel: str) -> Pending[Any]:
        """Receive the next note from ``src``."""
        ...

    def regroup(self, name: str, ranks: tuple[int, ...]) -> Transport:
        """Return the transport between other ranks of the same mesh, given by their numbers in it."""
        ...


@dataclass(frozen=True)
class Done:
    """A `Pending` whose result is there."""

    value: Any

    def wait(self) -> Any:
        """Return it."""
        return self.value


def signature(action: str, x: Tensor) -> str:
    """Write down a call, so that ranks can compare theirs."""
    return f"{action} of {kind(x.dtype, x.shape)}"


def kind(dtype: torch.dtype, shape: Iterable[int]) -> str:
    """Write down what a tensor is: ``float64 [3, 4]``."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def combine(parts: Sequence[Tensor], op: str) -> Tensor:
    """Reduce in the order of the parts, so that every rank and every transport gets the same bits.

    16-bit floats are added in float32 and rounded once.
    """
    first, *rest = parts
    if op == "max":
        total = first.clone()
        for part in rest:
            total = torch.maximum(total, part, out=total)
        return total
    wide = torch.float32 if first.is_floating_point() and first.itemsize < 4 else first.dtype
    total = first.to(wide, copy=True)
    for part in rest:
        total += part
    return total.to(first.dtype)


def check_channel(name: str, channel: str) -> int:
    """Return the number of a channel."""
    if channel not in CHANNELS:
        raise ValueError(f"transport of axis {name!r}: there is no channel {channel!r}; pass one of {', '.join(CHANNELS)}")
    return CHANNELS.index(channel)
