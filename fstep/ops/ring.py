"""Ring attention: keys and values go round the ranks, and each rank's queries see them all, one rank's at a time.

    3 ranks       step 0    step 1    step 2         what rank r's chunks r and 2C-1-r see of those of rank s:
    rank 0         kv 0      kv 2      kv 1
    rank 1         kv 1      kv 0      kv 2             s = r    both, causal
    rank 2         kv 2      kv 1      kv 0             s < r    both see the first chunk of s, all of it
                                                        s > r    the second sees both chunks of s, all of them

What is masked is not computed, and every step costs every rank the same: half of (2 chunks) x (2 chunks). The next keys
are on their way while the present ones are used. Results are joined by their logsumexp, in float32 at least:

    L = log(exp(L1) + exp(L2))        out = exp(L1 - L) out1 + exp(L2 - L) out2

Backward, keys and values go round again, and their gradients with them, one step behind; after the last step these are at
home. A part's gradient is computed from the output and L of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    """What the steps of one call have in common."""

    axis: Axis
    cu: Tensor
    max_seqlen: int
    window: int
    scale: float
    kernel: str


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
    ring = Ring(axis, cu, max_seqlen, window, scale, kernel)
    out, _ = _Forward.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def parts(ring: Ring, tokens: int, owner: int) -> Iterator[Part]:
    """Say what this rank's queries see of the keys of rank ``owner``."""
    if ring.window:
        yield from _parts_in_reach(ring, tokens, owner)
        return
    cu, n, rank = ring.cu, ring.max_seqlen, ring.axis.rank
    if owner == rank:
        yield Part(ALL, ALL, Rows(cu, cu, n, n, -1, 0))
        return
    first, second = zigzag.halves(cu, tokens)
    if owner < rank:
        yield Part(ALL, first, Rows(cu, cu // 2, n, n // 2))
    else:
        yield Part(second, ALL, Rows(cu // 2, cu, n // 2, n))


def _parts_in_reach(ring: Ring, tokens: int, owner: int) -> Iterator[Part]:
    """The same with a window, whose edge may go through chunks that are far apart: through others in each document.

    Two chunks that are ``far`` places apart, from one's start to the other's, are a document of their own, in which a query
    sees ``window - 1 - far`` places back, and any number ahead if these are other chunks. If that is less than nothing the
    first keys and the last queries see none of each other. This has to be known on the host.
    """
    size, rank = ring.axis.size, ring.axis.rank
    # By chunks too: a place must not come twice among the queries, nor among the keys, of one part.
    found: dict[tuple[int, int, int, int], list[tuple[int, int, int]]] = {}
    for start, end in boundaries(ring.cu, tokens, "cp_attention"):
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
    device = ring.cu.device
    for (_, _, left, right), spans in found.items():
        q = torch.cat([torch.arange(a, a + n) for a, _, n in spans]).to(device)
        k = torch.cat([torch.arange(b, b + n) for _, b, n in spans]).to(device)
        lengths = torch.tensor([0, *(n for *_, n in spans)], dtype=ring.cu.dtype)
        cu, longest = lengths.cumsum(0, dtype=ring.cu.dtype).to(device), int(lengths.max())
        yield Part(q, k, Rows(cu, cu, longest, longest, left, right))


def _owners(axis: Axis) -> list[int]:
    """Whose keys this rank has in each step."""
    return [(axis.rank - step) % axis.size for step in range(axis.size)]


class _Forward(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        axis, wide = ring.axis, torch.promote_types(q.dtype, torch.float32)
        talk, onward = ex.transport("cp_attention", axis), ex.permutation(1, axis)
        action = "cp_attention with gradient" if q.requires_grad or k.requires_grad or v.requires_grad else "cp_attention"
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((*q.shape[:2], 1), -torch.inf, dtype=wide, device=q.device)
        kv = torch.stack([k, v])
        for owner in _owners(axis):
            last = owner == (axis.rank + 1) % axis.size
            coming = None if last else talk.permute(kv, onward, action=action)
            for part in parts(ring, len(q), owner):
                y, s = kernels.run(ring.kernel, q[part.q], kv[0][part.k], kv[1][part.k], part.rows, ring.scale)
                old, s = lse[part.q], s.t()[..., None]
                new = torch.logaddexp(old, s)
                out[part.q] = out[part.q] * (old - new).exp() + y * (s - new).exp()
                lse[part.q] = new
            if coming is not None:
                kv = coming.wait()
        return out.to(q.dtype), lse[..., 0].t().contiguous()

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
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        kv, arriving = torch.stack([k, v]), None
        for owner in _owners(axis):
            last = owner == (axis.rank + 1) % axis.size
            coming = None if last else talk.permute(kv, onward, action=action)
            dkv = torch.zeros(kv.shape, dtype=wide, device=kv.device)
            for part in parts(ring, len(q), owner):
                at, seen = part.q, (kv[0][part.k], kv[1][part.k])
                each = (g[at], q[at], *seen, out[at], lse[:, at], part.rows, ring.scale)
                for whole, rows, more in zip(
                    (dq, dkv[0], dkv[1]), (at, part.k, part.k), kernels.pull(ring.kernel, *each), strict=True
                ):
                    whole[rows] += more
            if arriving is not None:
                dkv += arriving.wait()
            arriving = talk.permute(dkv, onward, action=action)
            if coming is not None:
                kv = coming.wait()
        assert arriving is not None
        dk, dv = arriving.wait().to(k.dtype)
        return dq.to(q.dtype), dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "cp_attention: method 'ring' can be differentiated once; pass method='allgather', kernel='math' to do it again"
        )
