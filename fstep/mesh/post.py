"""Messages between two processes, through torch.distributed.

gloo    a text that says what comes, then the bytes; the receiver reads the one before it makes room for the other
NCCL    the bytes, in a communicator of their own for each channel and direction; nothing is checked
notes   small Python values, past the device: always through gloo
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fstep.mesh.transport import CHANNELS, Done, MeshError, Pending, Transport, check_channel, kind
from fstep.mesh.wire import TEXT, Seat, Unpickled, Working, as_bytes, as_text, explain, read_text

NOTES = 1 + len(CHANNELS)  # the first tag of notes, which may be read before the tensors that were sent ahead of them


@dataclass(frozen=True, eq=False)
class Post(Transport):
    """One rank's end of the groups of an axis: ``channels`` and ``notes`` for messages, ``group`` for calls of all ranks.

    There is a group for each channel and direction: two ranks that send to each other at the same time would else, on
    NCCL, each wait for the other to receive first.
    """

    seat: Seat
    name: str
    ranks: tuple[int, ...]
    rank: int
    group: Any
    channels: Sequence[Any]
    notes: Any
    connected: set[tuple[str, int, int]] = field(default_factory=set)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @property
    def native(self) -> bool:
        """Whether the backend adds by itself and runs ahead of us."""
        return self.seat.backend == "nccl"

    def explain(self, action: str) -> contextlib.AbstractContextManager[None]:
        """Name this axis in errors."""
        return explain(f"{action} over {self.name!r}", self.seat, self.ranks)

    def _label(self, rank: int) -> str:
        return self.seat.labels[self.ranks[rank]]

    def _run(self, action: str, out: Tensor, held: Any, start: Callable[[], Any]) -> Pending[Tensor]:
        """Start an operation that fills ``out``."""
        if not out.numel():
            return Done(out)
        with self.explain(action):
            works = start()
        return Working(
            functools.partial(self.explain, action), works if isinstance(works, list) else [works], held, lambda: out
        )

    def _post(self, x: Tensor, dst: int, group: Any, tag: int) -> Any:
        import torch.distributed as dist

        return dist.isend(x, self.ranks[dst], group=group, tag=tag)

    def _fetch(self, x: Tensor, src: int, group: Any, tag: int) -> Any:
        import torch.distributed as dist

        return dist.irecv(x, self.ranks[src], group=group, tag=tag)

    def _channel(self, channel: str, src: int, dst: int) -> Any:
        return self.channels[2 * check_channel(self.name, channel) + (src > dst)]

    @override
    def connect(self, links: Sequence[tuple[str, int, int]]) -> None:
        if not self.native:
            return
        for channel, src, dst in links:
            if self.rank not in (src, dst) or (channel, src, dst) in self.connected:
                continue
            byte = torch.zeros(1, dtype=torch.uint8, device="cuda")
            if self.rank == src:
                self.send(byte, dst, channel=channel).wait()
            else:
                self.recv(src, (1,), torch.uint8, channel=channel).wait()
            self.connected.add((channel, src, dst))

    def _message(self, what: str, x: Tensor, dst: int, group: Any, channel: str, tag: int) -> Pending[None]:
        """Send bytes; through gloo, preceded by what they are."""
        action = f"send (channel {channel!r}) to {self._label(dst)}"
        buffers = [as_text(what)] if group is self.notes else []
        buffers += [as_bytes(x)] if x.numel() else []
        with self.explain(action):
            works = [self._post(b, dst, group, tag) for b in buffers]
        return Working(functools.partial(self.explain, action), works, (buffers, x), lambda: None)

    @override
    def send(self, x: Tensor, dst: int, *, channel: str) -> Pending[None]:
        group, tag = self._channel(channel, self.rank, dst), 1 + check_channel(self.name, channel)
        return self._message(kind(x.dtype, x.shape), x.detach(), dst, group, channel, tag)

    @override
    def send_note(self, note: Any, dst: int, *, channel: str) -> Pending[None]:
        x = torch.frombuffer(bytearray(pickle.dumps(note)), dtype=torch.uint8)
        tag = NOTES + check_channel(self.name, channel)
        return self._message(f"a note of {x.numel()} bytes", x, dst, self.notes, channel, tag)

    def _announced(self, src: int, channel: str, tag: int, then: Callable[[str], Tensor]) -> Pending[Any]:
        """Receive through gloo: first the text, then the bytes that ``then`` makes room for.

        Nothing is posted before `wait`: the text of a second message would take the bytes of the first.
        """
        action = f"recv (channel {channel!r}) from {self._label(src)}"

        def receive() -> Tensor:
            text = torch.empty(TEXT, dtype=torch.uint8)
            with self.explain(action):
                self._fetch(text, src, self.notes, tag).wait()
            out = then(read_text(text))
            if out.numel():
                with self.explain(action):
                    self._fetch(as_bytes(out), src, self.notes, tag).wait()
            return out

        return Working(functools.partial(self.explain, action), [], None, receive)

    def _expect(self, src: int, channel: str, expected: str, sent: str) -> MeshError:
        return MeshError(
            f"recv over {self.name!r} (channel {channel!r}): {self._label(self.rank)} expects {expected} and "
            f"{self._label(src)} sent {sent}"
        )

    @override
    def recv(self, src: int, shape: Sequence[int], dtype: torch.dtype, *, channel: str) -> Pending[Tensor]:
        number, expected = check_channel(self.name, channel), kind(dtype, shape)
        if self.native:
            out = torch.empty(tuple(shape), dtype=dtype, device="cuda")
            action = f"recv (channel {channel!r}) from {self._label(src)}"
            group = self._channel(channel, src, self.rank)
            return self._run(action, out, None, lambda: self._fetch(as_bytes(out), src, group, 0))

        def then(sent: str) -> Tensor:
            if sent != expected:
                raise self._expect(src, channel, expected, sent)
            return torch.empty(tuple(shape), dtype=dtype)

        return self._announced(src, channel, 1 + number, then)

    @override
    def recv_note(self, src: int, *, channel: str) -> Pending[Any]:
        def then(sent: str) -> Tensor:
            if not sent.startswith("a note of "):
                raise self._expect(src, channel, "a note", sent)
            return torch.empty(int(sent.split()[3]), dtype=torch.uint8)

        return Unpickled(self._announced(src, channel, NOTES + check_channel(self.name, channel), then))
