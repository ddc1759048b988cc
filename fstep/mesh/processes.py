"""The transport of real ranks: processes, between which torch.distributed moves tensors.

    gloo    CPU tensors. What gloo leaves unchecked is checked here: each call compares what the ranks call, each message
            is preceded by what it is. Sums are added in the order of ranks: the same bits as in `simulate`.
    NCCL    GPU tensors. One communicator per axis for calls of all ranks, and one per channel and direction for messages,
            so that traffic of one kind never waits for another's. Nothing is checked, since checking would stop the GPU.

Notes (small Python values) always go through gloo.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fstep.mesh.post import Post
from fstep.mesh.transport import CHANNELS, Done, MeshError, Pending, combine, signature
from fstep.mesh.wire import (
    TEXT,
    Seat,
    as_bytes,
    as_text,
    explain,
    for_messages,
    gather_into,
    read_text,
    scatter_sum_into,
)

# The groups made inside a torch.distributed that somebody else has set up, and that outlives our meshes: torch names a group
# after its ranks, and one made again under an old name would look for the addresses of the first.
_kept: dict[Any, dict[tuple[Any, ...], Any]] = {}


@dataclass
class Processes:
    """The groups that this process has joined; ``keep`` them for the next mesh, in a torch.distributed that goes on."""

    seat: Seat
    keep: bool = False
    groups: dict[tuple[int, ...], ProcessTransport] = field(default_factory=dict)

    def transport(self, name: str, ranks: tuple[int, ...]) -> ProcessTransport:
        """Return what this rank uses to talk to ``ranks``; the first time, all of them make the groups together."""
        if ranks not in self.groups:
            nccl = self.seat.backend == "nccl"
            with explain(f"making the process groups of axis {name!r}", self.seat, ranks):
                main = self._group(ranks, self.seat.backend, name)
                ways = [f"{name} {channel} {way}" for channel in CHANNELS for way in ("up", "down")]
                own = [for_messages(self.seat.timeout) if nccl else None for _ in ways]
                channels = [self._group(ranks, "nccl", w, o) if nccl else main for w, o in zip(ways, own, strict=True)]
                notes = self._group(ranks, "gloo", f"{name} notes") if nccl else main
            self.groups[ranks] = ProcessTransport(
                self.seat, name, ranks, ranks.index(self.seat.rank), main, channels, notes, world=self
            )
        return self.groups[ranks]

    def _group(self, ranks: tuple[int, ...], backend: str, description: str, options: Any = None) -> Any:
        import torch.distributed as dist

        if self.keep and dist.group.WORLD not in _kept:
            _kept.clear()
        known = _kept.setdefault(dist.group.WORLD, {}) if self.keep else {}
        key = (ranks, backend, self.seat.timeout, description.partition(" ")[2])
        if key not in known:
            # Only the members take part, so that axes of different stages need not be made in step. The description is what
            # NCCL's watchdog reports when it ends a process that waits for too long.
            known[key] = dist.new_group(
                list(ranks),
                backend=backend,
                pg_options=options,
                timeout=datetime.timedelta(seconds=self.seat.timeout),
                use_local_synchronization=True,
                group_desc=f"fstep axis {description}",
            )
        return known[key]

    def close(self) -> None:
        """Leave every group."""
        import torch.distributed as dist

        for transport in () if self.keep else self.groups.values():
            for group in {id(g): g for g in (transport.group, *transport.channels, transport.notes)}.values():
                dist.destroy_process_group(group)
        self.groups.clear()


@dataclass(frozen=True, eq=False)
class ProcessTransport(Post):
    """One rank's end of the groups of an axis: calls of all ranks, and the messages of `Post`."""

    world: Processes = field(kw_only=True)

    def _check(self, action: str, sign: str, x: Tensor) -> None:
        """Compare what the ranks are about to call."""
        if x.device.type != ("cuda" if self.native else "cpu"):
            raise ValueError(
                f"{action}: x is on {x.device}, and axis {self.name!r} talks through {self.seat.backend}; move x, or "
                "start the mesh with the other backend"
            )
        if self.native:
            return
        mine, all_texts = as_text(sign), torch.empty(self.size * TEXT, dtype=torch.uint8)
        with self.explain(action):
            gather_into(all_texts, mine, self.group, False)
        for other, text in enumerate(all_texts.view(self.size, TEXT)):
            if text.ne(mine).any():
                raise MeshError(
                    f"axis {self.name!r}: {self._label(self.rank)} calls {sign} and {self._label(other)} calls "
                    f"{read_text(text)}; all ranks of an axis have to make the same calls in the same order"
                )

    def _move(self, action: str, x: Tensor, out: Tensor, f: Callable[..., Any]) -> Pending[Tensor]:
        """Start a call of torch.distributed that moves bytes and computes nothing."""
        return self._run(action, out, x, lambda: f(as_bytes(out), as_bytes(x), group=self.group, async_op=True))

    @override
    def all_gather(self, x: Tensor, *, action: str) -> Pending[Tensor]:

        self._check(action, signature(action, x), x)
        return self._move(action, x, x.new_empty(self.size, *x.shape), gather_into)

    @override
    def all_to_all(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        import torch.distributed as dist

        self._check(action, signature(action, x), x)
        return self._move(action, x, torch.empty_like(x), dist.all_to_all_single)

    @override
    def all_reduce(self, x: Tensor, *, action: str, op: str = "sum") -> Pending[Tensor]:
        import torch.distributed as dist

        self._check(action, signature(action, x), x)
        if self.native:
            how, out = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, x.clone()
            return self._run(action, out, None, lambda: dist.all_reduce(out, how, group=self.group, async_op=True))
        # Each rank reduces one part and all gather the parts: gloo's own traffic, and our order of addition.
        flat, each = x.reshape(-1), -(-x.numel() // self.size)
        parts = torch.cat([flat, flat.new_zeros(each * self.size - flat.numel())]).view(self.size, each)
        mine = combine(self._move(action, parts, torch.empty_like(parts), dist.all_to_all_single).wait().unbind(), op)
        whole = self._move(action, mine, torch.empty_like(parts), gather_into).wait()
        return Done(whole.view(-1)[: x.numel()].view(x.shape))

    @override
    def reduce_scatter(self, x: Tensor, *, action: str) -> Pending[Tensor]:
        import torch.distributed as dist

        self._check(action, signature(action, x), x)
        if self.native:
            out = x.new_empty(x.shape[1:])
            return self._run(action, out, x, lambda: scatter_sum_into(out, x, self.group, True))
        parts = self._move(action, x, torch.empty_like(x), dist.all_to_all_single).wait()
        return Done(combine(parts.unbind(), "sum"))

    @override
    def broadcast(self, x: Tensor, src: int, *, action: str) -> Pending[Tensor]:
        import torch.distributed as dist

        self._check(action, signature(f"{action} from {src}", x), x)
        out = x.clone()
        return self._run(
            action, out, None, lambda: dist.broadcast(as_bytes(out), self.ranks[src], group=self.group, async_op=True)
        )

    @override
    def permute(self, x: Tensor, to: Sequence[int], *, action: str) -> Pending[Tensor]:
        import torch.distributed as dist

        self._check(action, signature(f"{action} to {list(to)}", x), x)
        if to[self.rank] == self.rank:
            return Done(x.clone())
        out, src = torch.empty_like(x), list(to).index(self.rank)
        ops = [
            dist.P2POp(dist.isend, as_bytes(x), self.ranks[to[self.rank]], group=self.group),
            dist.P2POp(dist.irecv, as_bytes(out), self.ranks[src], group=self.group),
        ]
        return self._run(action, out, x, lambda: dist.batch_isend_irecv(ops))

    @override
    def regroup(self, name: str, ranks: tuple[int, ...]) -> ProcessTransport:
        return self.world.transport(name, ranks)
