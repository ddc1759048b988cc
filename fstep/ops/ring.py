"""Ring attention: keys and values go round the ranks, and each rank's queries see them all, one rank's at a time.

    3 ranks       step 0    step 1    step 2         what rank r's chunks r and 2C-1-r see of those of rank s:
    rank 0         kv 0      kv 2      kv 1
    rank 1         kv 1      kv 0      kv 2             s = r    both, causal
    rank 2         kv 2      kv 1      kv 0             s < r    both see the first chunk of s, all of it
                                                        s > r    the second sees both chunks of s, all of them

What is masked is not computed, and every step costs every rank the same: half of (2 chunks) x (2 chunks). The next keys
are on their way while the present ones are used. Results are joined by their logsumexp, in float32 at least:

    w = sigmoid(L2 - L1)        out = (1 - w) out1 + w out2        L = log(exp(L1) + exp(L2))

Backward, keys and values go round again, and their gradients with them, one step behind; what a rank's own queries add to
them stays at home, where the others' addends arrive after the last step. A part's gradient is computed from the output and
L of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.mesh import exchange as ex
from fstep.mesh.axis import Axis
from fstep.ops import kernels, zigzag
from fstep.ops.rows import Rows, boundaries
from fstep.trace import in_transform


@dataclass(frozen=True)
class Ring:
    """What the steps of one call have in common: a row of ``tokens`` places, and how it is attended to."""

    axis: Axis
    cu: Tensor
    tokens: int
    max_seqlen: int
    window: int
    scale: float
    kernel: str

    @cached_property
    def halves(self) -> tuple[Tensor | slice, Tensor | slice]:
        """The places of first and of second chunks."""
        return zigzag.halves(self.cu, self.tokens)

    @cached_property
    def documents(self) -> list[tuple[int, int]]:
        """Where documents start and end, on the host."""
        return boundaries(self.cu, self.tokens, "cp_attention")

    def owners(self) -> Iterator[tuple[int, bool]]:
        """Yield whose keys this rank has in each step, and whether more will come."""
        for step in range(self.axis.size):
            yield (self.axis.rank - step) % self.axis.size, step + 1 < self.axis.size


@dataclass(frozen=True)
class Part:
    """Some of a rank's queries, some of the keys it has got, and which of these they see."""

    q: Tensor | slice
    k: Tensor | slice
    rows: Rows


ALL = slice(None)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *, axis: Axis, max_seqlen: int, window: int, scale: float, kernel: str
) -> Tensor:
    """Attend over a row that is spread over ``axis``; see `cp_attention`, which has checked the arguments."""
    if in_transform():
        raise ValueError("cp_attention: method 'ring' does not run inside torch.func; pass method='allgather'")
    if kernel == "math":
        raise ValueError(
            "cp_attention: kernel 'math' is for being differentiated twice, and a ring is not; pass method='allgather', or "
            "kernel='documents' for plain products"
        )
    ring = Ring(axis, cu, len(q), max_seqlen, window, scale, kernel)
    out, _ = _Forward.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def parts(ring: Ring, owner: int) -> Iterator[Part]:
    """Say what this rank's queries see of the keys of rank ``owner``; first of all, all of its own."""
    if ring.window:
        yield from _parts_in_reach(ring, owner)
        return
    cu, n, rank = ring.cu, ring.max_seqlen, ring.axis.rank
    first, second = ring.halves
    if owner == rank:
        yield Part(ALL, ALL, Rows(cu, cu, n, n, -1, 0))
    elif owner < rank:
        yield Part(ALL, first, Rows(cu, cu // 2, n, n // 2))
    else:
        yield Part(second, ALL, Rows(cu // 2, cu, n // 2, n))


def _parts_in_reach(ring: Ring, owner: int) -> Iterator[Part]:
    """The same with a window, whose edge may go through chunks that are far apart: through others in each document.

    Two chunks that are ``far`` places apart, from one's start to the other's, are a document of their own, in which a query
    sees ``window - 1 - far`` places back, and any number ahead if these are other chunks. If that is less than nothing the
    first keys and the last queries see none of each other. This has to be known on the host.
    """
    size, rank = ring.axis.size, ring.axis.rank
    # By chunks too: a place must not come twice among the queries, nor among the keys, of one part.
    found: dict[tuple[int, int, int, int], list[tuple[int, int, int]]] = {}
    for start, end in ring.documents:
        chunk = (end - start) // 2
        for i, of_q in enumerate((rank, 2 * size - 1 - rank)):
            for j, of_k in enumerate((owner, 2 * size - 1 - owner)):
                far = (of_q - of_k) * chunk
                left = ring.window - 1 - far
                out = max(0, -left)
                if far < 0 or chunk <= out:
                    continue
                reach = (-1 if left >= chunk - 1 else max(left, 0), -1 if far else 0)
                at = (start + i * chunk, start + j * chunk + out, chunk - out)
                found.setdefault((i, j, *reach), []).append(at)
    for (_, _, left, right), spans in found.items():
        lengths = [n for *_, n in spans]
        table = torch.tensor(list(zip(*spans, strict=True))).to(ring.cu.device, non_blocking=True)
        cu = torch.nn.functional.pad(table[2].cumsum(0), (1, 0)).to(ring.cu.dtype)
        q, k = (zigzag.ranges(starts, table[2], sum(lengths)) for starts in table[:2])
        yield Part(q, k, Rows(cu, cu, max(lengths), max(lengths), left, right))


def _join(out: Tensor, lse: Tensor, part: Part, y: Tensor, s: Tensor) -> None:
    """Join the result over some of the keys to ``out`` [T, heads, head_dim] and ``lse`` [heads, T], in place."""
    rows, old = out[part.q], lse[:, part.q]
    keep, take = ((x.sigmoid().t()[..., None]) for x in (old - s, s - old))
    rows.mul_(keep).addcmul_(y, take)
    if isinstance(part.q, Tensor):  # otherwise a view
        out[part.q] = rows
    lse[:, part.q] = torch.logaddexp(old, s)


def _add(whole: Tensor, at: Tensor | slice, more: Tensor) -> None:
    """Add to some of the rows, in place."""
    if isinstance(at, slice):
        whole[at].add_(more)
    else:
        whole[at] += more


def _add_pairs(dkv: Tensor, found: list[tuple[Tensor | slice, list[Tensor]]]) -> None:
    """Add what parts have found for the gradients of keys and values."""
    for at, pair in found:
        for whole, more in zip(dkv, pair, strict=True):
            _add(whole, at, more)


class _Forward(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        axis, wide = ring.axis, torch.promote_types(q.dtype, torch.float32)
        talk, onward = ex.transport("cp_attention", axis), ex.permutation(1, axis)
        action = "cp_attention with gradient" if q.requires_grad or k.requires_grad or v.requires_grad else "cp_attention"
        out = lse = None
        kv = torch.stack([k, v])
        for owner, more in ring.owners():
            coming = talk.permute(kv, onward, action=action) if more else None
            for part in parts(ring, owner):
                y, s = kernels.run(ring.kernel, q[part.q], kv[0][part.k], kv[1][part.k], part.rows, ring.scale)
                if out is None or lse is None:
                    if part.q is ALL:
                        out, lse = y.to(wide), s
                        continue
                    out = torch.zeros(q.shape, dtype=wide, device=q.device)
                    lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=wide, device=q.device)
                _join(out, lse, part, y, s)
            if coming is not None:
                kv = coming.wait()
        assert out is not None and lse is not None
        return out.to(q.dtype), lse.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *qkv, ctx.ring = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*qkv, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
        grads: tuple[Tensor, ...] = _Backward.apply(g, *ctx.saved_tensors, ctx.ring)  # type: ignore[no-untyped-call]
        return (*grads, None)


class _Backward(Function):
    @staticmethod
    def forward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: Ring
    ) -> tuple[Tensor, Tensor, Tensor]:
        axis, wide = ring.axis, torch.promote_types(q.dtype, torch.float32)
        talk, onward, action = ex.transport("cp_attention", axis), ex.permutation(1, axis), "gradient of cp_attention"
        dq = arriving = None
        kv, own = torch.stack([k, v]), []
        for owner, more in ring.owners():
            coming = talk.permute(kv, onward, action=action) if more else None
            found = []
            for part in parts(ring, owner):
                at, seen = part.q, (kv[0][part.k], kv[1][part.k])
                rest = (g[at], q[at], *seen, out[at], lse[:, at], part.rows, ring.scale)
                dq_part, *dkv_part = kernels.pull(ring.kernel, *rest)
                found.append((part.k, dkv_part))
                if dq is None and at is ALL:
                    dq = dq_part.to(wide)
                    continue
                dq = torch.zeros(q.shape, dtype=wide, device=q.device) if dq is None else dq
                _add(dq, at, dq_part)
            if owner == axis.rank:
                own = found
            else:
                # Waited for behind the kernels: by then it has come.
                dkv = kv.new_zeros(kv.shape, dtype=wide) if arriving is None else arriving.wait()
                _add_pairs(dkv, found)
                arriving = talk.permute(dkv, onward, action=action)
            if coming is not None:
                kv = coming.wait()
        assert dq is not None and arriving is not None
        dkv = arriving.wait()
        _add_pairs(dkv, own)
        dk, dv = dkv.to(k.dtype)
        return dq.to(q.dtype), dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "cp_attention: method 'ring' can be differentiated once; pass method='allgather', kernel='math' to do it again"
        )
