"""Between processes: who this one is, what is on its way, what an error of torch.distributed meant, tensors as bytes.

rank 1 (dp 1): psum over 'dp' failed; one of rank 0 (dp 0) has died or raised, or did not come within 600 seconds
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.transport import MeshError, Pending

TEXT = 256  # bytes of a call's text that ranks compare; of a message's text that precedes it


@dataclass(frozen=True)
class Seat:
    """This process among all: its rank, what it talks through, how long it waits, and what the ranks are called."""

    rank: int
    backend: str
    timeout: float
    labels: Sequence[str]


@contextlib.contextmanager
def explain(action: str, seat: Seat, ranks: Sequence[int]) -> Iterator[None]:
    """Say in an error of torch.distributed what was going on and between whom."""
    try:
        yield
    except MeshError:
        raise
    except RuntimeError as error:
        others = [seat.labels[r] for r in ranks if r != seat.rank]
        whom = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        # Without the file it comes from, and what it says about logs after the first sentence.
        reason = re.sub(r"^\[\S+:\d+\] ", "", f"{error}".strip()).partition("\n")[0].partition(". ")[0]
        raise MeshError(
            f"{seat.labels[seat.rank]}: {action} failed; one of {whom} has died or raised, or did not come within "
            f"{seat.timeout:g} seconds ({reason or type(error).__name__})"
        ) from error


@dataclass(frozen=True)
class Working:
    """A `Pending` of torch.distributed. It holds on to the buffers, which may not be freed before it is done."""

    explain: Callable[[], contextlib.AbstractContextManager[None]]
    works: Sequence[Any]
    held: Any
    result: Callable[[], Any]

    def wait(self) -> Any:
        """Wait for all of it."""
        with self.explain():
            for work in self.works:
                work.wait()
        return self.result()


@dataclass(frozen=True)
class Unpickled:
    """The value of a note, once its bytes are there."""

    bytes_of: Pending[Tensor]

    def wait(self) -> Any:
        """Wait for the bytes, and read them."""
        return pickle.loads(bytes(self.bytes_of.wait().tolist()))


def as_bytes(x: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor, which every backend can move whatever its dtype."""
    return x.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def as_text(text: str) -> Tensor:
    """Write a text of fixed length."""
    return torch.frombuffer(bytearray(text.encode()[:TEXT].ljust(TEXT)), dtype=torch.uint8)


def read_text(x: Tensor) -> str:
    """Read what `as_text` wrote."""
    return bytes(x.tolist()).decode(errors="replace").rstrip()


def for_messages(timeout: float) -> Any:
    """Return what NCCL is told about a group that messages go through.

    A message whose other end is not there yet waits on the device, and its blocks of threads keep as many processors from
    computing: a few are enough. It goes first, since another rank computes nothing until it has come.
    """
    import torch.distributed as dist

    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 4
    options._timeout = datetime.timedelta(seconds=timeout)  # torch warns where it is not that of the group
    return options


def gather_into(out: Tensor, x: Tensor, group: Any, async_op: bool) -> Any:
    """Gather into one tensor. torch 2.13 has renamed the function, and warns of the old name."""
    import torch.distributed as dist

    f = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return f(out, x, group=group, async_op=async_op)


def scatter_sum_into(out: Tensor, x: Tensor, group: Any, async_op: bool) -> Any:
    """Reduce and scatter one tensor; renamed likewise."""
    import torch.distributed as dist

    f = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return f(out, x, group=group, async_op=async_op)
