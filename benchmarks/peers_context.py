"""Others' attention over ranks, on the kernel that fstep takes, so that what is compared is how ranks talk.

ring-flash-attn       its zigzag ring for packed documents; the calls of its kernel go to fstep.ops.kernels
all-gather by hand    torch.distributed and two calls of the kernel, for one document, written straight down
torch                 torch.distributed.tensor.experimental.context_parallel: one document, SDPA's kernels, heads repeated

Every side lays documents out alike: rank r of C holds chunks r and 2C-1-r of each, end to end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fstep
from fstep.mesh.wire import gather_into, scatter_sum_into
from fstep.ops import fa4, kernels
from fstep.ops.rows import Rows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """Packed documents over the ranks of a mesh. Lengths are those of whole documents and divide into 2C chunks."""

    name: str
    lengths: tuple[int, ...]
    mesh: fstep.Mesh
    device: str

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.mesh.cp.size

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Places of the longest document on one rank."""
        return max(self.lengths) // self.size

    def boundaries(self, parts: int) -> Tensor:
        """Return where documents begin and end, in the whole row (1) or in that of one of so many ranks."""
        return F.pad(torch.tensor(self.lengths).cumsum(0) // parts, (1, 0)).to(self.device, torch.int32)

    def mine(self, x: Tensor) -> Tensor:
        """Cut this rank's places out of the whole row."""
        found = []
        for document in torch.split(x, list(self.lengths)):
            chunks = document.chunk(2 * self.size)
            found += [chunks[self.mesh.cp.rank], chunks[2 * self.size - 1 - self.mesh.cp.rank]]
        return torch.cat(found)


def forward_of_theirs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Any, ...]:
    """Stand in for flash-attn's function of this purpose."""
    rows = Rows(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, -1, 0 if causal else -1)
    return *kernels.run("auto", q, k, v, rows, softmax_scale), None, None


def backward_of_theirs(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: Any = None,
    deterministic: bool = False,
) -> None:
    """Stand in for its backward, which writes into the tensors it is given; FA4 does so too, and no copy is made."""
    rows = Rows(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, -1, 0 if causal else -1)
    lse = softmax_lse.contiguous()
    if kernels.choose(q, k, rows) == "fa4":
        into: dict[str, Any] = dict(dq=dq, dk=dk, dv=dv)
        fa4.package()._flash_attn_bwd(q, k, v, out, dout, lse, **into, **fa4._options(rows, softmax_scale))
        return
    for to, x in zip((dq, dk, dv), kernels.pull("auto", dout, q, k, v, out, lse, rows, softmax_scale), strict=True):
        to.copy_(x)


@cache
def package() -> Any:
    """Import ring-flash-attn without flash-attn 2, whose kernel it asks for, and without its part for transformers."""

    def stand_in(name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module

    if not fa4.is_there():
        stand_in("flash_attn", __path__=[])
    stand_in(
        "flash_attn.flash_attn_interface",
        _flash_attn_varlen_forward=forward_of_theirs,
        _flash_attn_varlen_backward=backward_of_theirs,
        _flash_attn_forward=None,
        _flash_attn_backward=None,
    )
    stand_in("ring_flash_attn.adapters", substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    return import_module("ring_flash_attn")


def ring_flash_attn(row: Row) -> Attend:
    """Its zigzag ring over packed documents."""
    attend, cu, longest = package().zigzag_ring_flash_attn_varlen_func, row.boundaries(row.size), row.longest
    group = dist.group.WORLD

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, cu, longest, causal=True, group=group)
        assert isinstance(out, Tensor)
        return out

    return run


class ByHand(torch.autograd.Function):
    """Gather keys and values, put chunks in order, attend with the early chunk and with the late one; and back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rank: int, size: int) -> Tensor:
        """Attend, and keep what was gathered."""
        chunk, scale = len(q) // 2, q.shape[2] ** -0.5
        both = q.new_empty(size, 2, *k.shape)
        gather_into(both.view(-1), torch.stack([k, v]).view(-1), dist.group.WORLD, False)
        halves = both.view(size, 2, 2, chunk, *k.shape[1:])  # rank, k or v, early or late
        k, v = (torch.cat([halves[:, i, 0].flatten(0, 1), halves[:, i, 1].flip(0).flatten(0, 1)]) for i in range(2))
        calls = [(slice(chunk), rank + 1), (slice(chunk, None), 2 * size - rank)]
        found = []
        for at, chunks in calls:
            n = chunks * chunk
            found.append(kernels.run("auto", q[at], k[:n], v[:n], one_document(chunk, n, q), scale))
        out = torch.cat([y for y, _ in found])
        ctx.save_for_backward(q, k, v, out, *(lse for _, lse in found))
        ctx.rest = calls, chunk, scale, size
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Add what the two chunks say of each key, and send it home."""
        g, (q, k, v, out, *lses), (calls, chunk, scale, size) = grads[0], ctx.saved_tensors, ctx.rest
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (at, chunks), lse in zip(calls, lses, strict=True):
            n = chunks * chunk
            rows = one_document(chunk, n, q)
            dq[at], *more = kernels.pull("auto", g[at], q[at], k[:n], v[:n], out[at], lse, rows, scale)
            for whole, x in zip((dk, dv), more, strict=True):
                whole[:n] += x
        early, late = (torch.stack([x.view(2 * size, chunk, *x.shape[1:])[i] for x in (dk, dv)], 1) for i in halves_of(size))
        parts = torch.stack([early, late], 2)  # rank, k or v, early or late
        mine = parts.new_empty(parts.shape[1:])
        if dist.get_backend() == "nccl":
            scatter_sum_into(mine.view(-1), parts.view(-1), dist.group.WORLD, False)
        else:  # which gloo has not
            dist.all_reduce(parts)
            mine = parts[dist.get_rank()]
        return dq, mine[0].flatten(0, 1), mine[1].flatten(0, 1), None, None


def halves_of(size: int) -> tuple[slice, Any]:
    """Return the chunks that ranks hold as their first, and as their second."""
    return slice(size), list(range(2 * size - 1, size - 1, -1))


def one_document(queries: int, keys: int, like: Tensor) -> Rows:
    """Return the rows of one causal document."""
    cu = torch.tensor([[0, queries], [0, keys]], dtype=torch.int32).to(like.device, non_blocking=True)
    return Rows(cu[0], cu[1], queries, keys, -1, 0)


def by_hand(row: Row) -> Attend:
    """All-gather, for one document."""
    if len(row.lengths) > 1:
        raise ValueError("is written for one document")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ByHand.apply(q, k, v, row.mesh.cp.rank, row.size)  # type: ignore[no-untyped-call]
        return out

    return run


def torchs(row: Row, backend: str) -> Callable[[Callable[[Attend], Any]], Any]:
    """Return what runs a step inside torch's context, in which SDPA talks to the other ranks."""
    if len(row.lengths) > 1:
        raise ValueError("knows no documents")
    if row.device == "cpu":
        raise ValueError("has kernels for CUDA alone")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ranks = init_device_mesh("cuda", (row.size,))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        whole = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        return F.scaled_dot_product_attention(*whole, is_causal=True)[0].transpose(0, 1)  # type: ignore[misc, arg-type]

    def inside(step: Callable[[Attend], Any]) -> Any:
        marker = torch.arange(2 * row.size, device=row.device)[None]
        with sdpa_kernel(SDPBackend[backend]), context_parallel(ranks, buffers=[marker], buffer_seq_dims=[1]):
            return step(attend)

    return inside
