"""The transport of simulated ranks: what one thread hands to another, they being threads of one process.

    dp of 3, one call:    rank 0 puts x0    rank 1 puts x1    rank 2 puts x2, has x0 + x1 + x2 computed, wakes them

When the last rank has arrived at a call, everybody's result is computed, in a thread that is no rank's: which rank is the
last may differ between a forward pass and its recomputation, and the dispatch modes of a thread (of selective
checkpointing, of a counter of operations) would see what is not its rank's. A call is written down as text, and one that
differs from the text of the first to arrive is an error that shows both. Turn taking is in `turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fstep.mesh.transport import MeshError, Pending, Transport, check_channel, combine, kind, signature
from fstep.mesh.turns import Call, Turns, Wait


class World(Turns):
    """The ranks of one `simulate` call and the groups in which they talk."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(labels)
        self.groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self.nobody = ThreadPoolExecutor(1, "simulate exchange")

    @override
    def finish(self, rank: int) -> None:
        if len(self.returned) == len(self.labels) - 1:
            self.nobody.shutdown()
        super().finish(rank)

    def leftovers(self) -> list[str]:
        """List what was started and never met: calls that others did not make, messages that nobody received."""
        found = []
        for group in self.groups.values():
            for slot in group.slots.values():
                names = [group.label(r) for r in range(group.size)]
                made, missing = ([n for r, n in enumerate(names) if (r in slot.inputs) is has] for has in (True, False))
                found.append(f"  {', '.join(made)} started {slot.text}, and {', '.join(missing)} did not")
            for (src, dst, name), line in group.lines.items():
                if line.messages:
                    found.append(
                        f"  {group.label(src)} sent {len(line.messages)} messages to {group.label(dst)} over {group.name!r} "
                        f"(channel {name!r}) that were not received"
                    )
                elif line.held:
                    # Here it is harmless; between processes the buffer may be freed while it is being sent.
                    found.append(
                        f"  {group.label(src)} did not call wait() on {len(line.held)} messages to {group.label(dst)} over "
                        f"{group.name!r} (channel {name!r})"
                    )
        return found

    def transport(self, rank: int, name: str, ranks: tuple[int, ...]) -> ThreadTransport:
        """Return what ``rank`` uses to talk to ``ranks``."""
        group = self.groups.setdefault((name, ranks), Group(self, name, ranks))
        return ThreadTransport(group, ranks.index(rank))


@dataclass
class Slot:
    """One call that all ranks of a group make."""

    text: str
    signature: str
    first: int
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: list[Tensor | None] | None = None


@dataclass
class Line:
    """Messages from one rank to another on one channel, numbered."""

    sent: int = 0
    asked: int = 0
    messages: dict[int, tuple[str, Any]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # sent, and not waited for


class Group:
    """The ranks of one axis: the calls they have not all made yet, and messages on their way."""

    def __init__(self, world: World, name: str, ranks: tuple[int, ...]) -> None:
        self.world, self.name, self.ranks, self.size = world, name, ranks, len(ranks)
        self.calls = [0] * len(ranks)
        self.slots: dict[int, Slot] = {}
        self.lines: dict[tuple[int, int, str], Line] = {}

    def label(self, rank: int) -> str:
        """Name one of its ranks."""
        return self.world.labels[self.ranks[rank]]


@dataclass(frozen=True, eq=False)
class ThreadTransport(Transport):
    """One rank's end of a group."""

    group: Group
    rank: int

    def _meet(self, action: str, sign: str, x: Tensor, f: Callable[[list[Tensor]], list[Tensor]]) -> Pending[Tensor]:
        """Make a call of the whole group; when the last has arrived, everybody's result is computed."""
        group, world, me = self.group, self.group.world, self.rank
        world.check()
        number = group.calls[me]
        group.calls[me] += 1
        slot = group.slots.setdefault(number, Slot(f"{action} over {group.name!r}", sign, me))
        if slot.signature != sign:
            raise MeshError(
                f"axis {group.name!r}: {group.label(slot.first)} calls {slot.signature} and {group.label(me)} calls {sign}; "
                "all ranks of an axis have to make the same calls in the same order"
            )
        slot.inputs[me] = x.detach()

        def compute() -> list[Tensor | None]:
            return list(f([slot.inputs[r] for r in range(group.size)]))

        if len(slot.inputs) == group.size:
            del group.slots[number]
            slot.outputs = world.nobody.submit(compute).result()
            slot.inputs.clear()
            world.wake(id(slot))

        def missing() -> list[int]:
            return [group.ranks[r] for r in range(group.size) if r not in slot.inputs]

        def take() -> Tensor:
            assert slot.outputs is not None
            result, slot.outputs[me] = slot.outputs[me], None
            assert result is not None, f"{action}: wait() was called twice"
            return result

        waiting = Wait(id(slot), slot.text, missing)
        return Call(world, group.ranks[me], waiting, lambda: slot.outputs is not None, take)

    @override
    def all_gather(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        return self._meet(action, signature(action, x), x, lambda xs: [torch.stack(xs) for _ in xs])

    @override
    def all_to_all(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        return self._meet(
            action, signature(action, x), x, lambda xs: [torch.stack([x[r] for x in xs]) for r in range(len(xs))]
        )

    @override
    def all_reduce(self, x: Tensor, *, action: str, op: str = "sum") -> Pending[Tensor]:
        def f(xs: list[Tensor]) -> list[Tensor]:
            total = combine(xs, op)
            return [total, *(total.clone() for _ in xs[1:])]

        return self._meet(action, signature(action, x), x, f)

    @override
    def reduce_scatter(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        return self._meet(
            action, signature(action, x), x, lambda xs: [combine([x[r] for x in xs], "sum") for r in range(len(xs))]
        )

    @override
    def broadcast(self, x: Tensor, src: int, *, action: str) -> Pending[Tensor]:
        return self._meet(action, signature(f"{action} from {src}", x), x, lambda xs: [xs[src].clone() for _ in xs])

    @override
    def permute(self, x: Tensor, to: Sequence[int], *, action: str) -> Pending[Tensor]:
        def f(xs: list[Tensor]) -> list[Tensor]:
            return [xs[to.index(r)].clone() for r in range(len(xs))]

        return self._meet(action, signature(f"{action} to {list(to)}", x), x, f)

    def _line(self, src: int, dst: int, channel: str) -> Line:
        check_channel(self.group.name, channel)
        return self.group.lines.setdefault((src, dst, channel), Line())

    def _send(self, what: str, payload: Any, dst: int, channel: str) -> Pending[None]:
        group, world, line = self.group, self.group.world, self._line(self.rank, dst, channel)
        world.check()
        number = line.sent
        line.sent += 1
        line.messages[number] = what, payload
        line.held.add(number)
        world.wake(("sent", id(line), number))
        # Done when it was received, not when it was sent: so it is on gloo and NCCL, where waiting too early is a deadlock.
        waiting = Wait(
            ("received", id(line), number),
            f"send over {group.name!r} (channel {channel!r})",
            lambda: [group.ranks[dst]],
        )
        return Call(
            world, group.ranks[self.rank], waiting, lambda: number not in line.messages, lambda: line.held.remove(number)
        )

    def _recv(self, what: str, src: int, channel: str) -> Pending[Any]:
        group, world, line = self.group, self.group.world, self._line(src, self.rank, channel)
        world.check()
        number = line.asked
        line.asked += 1

        def take() -> Any:
            sent, payload = line.messages.pop(number)
            world.wake(("received", id(line), number))
            if sent != what:
                raise MeshError(
                    f"recv over {group.name!r} (channel {channel!r}): {group.label(self.rank)} expects {what} and "
                    f"{group.label(src)} sent {sent}"
                )
            return payload

        waiting = Wait(
            ("sent", id(line), number), f"recv over {group.name!r} (channel {channel!r})", lambda: [group.ranks[src]]
        )
        return Call(world, group.ranks[self.rank], waiting, lambda: number in line.messages, take)

    @override
    def connect(self, links: Sequence[tuple[str, int, int]]) -> None:
        pass

    @override
    def send(self, x: Tensor, dst: int, *, channel: str) -> Pending[None]:
        return self._send(kind(x.dtype, x.shape), x.detach().clone(), dst, channel)

    @override
    def recv(self, src: int, shape: Sequence[int], dtype: torch.dtype, *, channel: str) -> Pending[Tensor]:
        return self._recv(kind(dtype, shape), src, channel)

    @override
    def send_note(self, note: Any, dst: int, *, channel: str) -> Pending[None]:
        return self._send("a note", note, dst, channel)

    @override
    def recv_note(self, src: int, *, channel: str) -> Pending[Any]:
        return self._recv("a note", src, channel)

    @override
    def regroup(self, name: str, ranks: tuple[int, ...]) -> ThreadTransport:
        return self.group.world.transport(self.group.ranks[self.rank], name, ranks)
