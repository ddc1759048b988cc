"""Attention of packed rows as plain forward and backward functions that hand out the logsumexp.

Queries and keys are rows of the same documents, of different lengths perhaps: `cu_q` says where a document's queries are,
`cu_k` where its keys. The last query stands at the last key, and a reach ``(left, right)`` says how far a query sees from
where it stands; -1 is without end.

    3 queries, 5 keys      (-1, -1)      (-1, 0)       (1, 0)        every key, causal, a window of 2
                           x x x x x     x x x . .     . x x . .
                           x x x x x     x x x x .     . . x x .
                           x x x x x     x x x x x     . . . x x

With the logsumexp L of its scores a result over some of the keys can be joined to one over others, and the backward of a
part is that of the whole, given the whole's output and L. That is what a ring of ranks needs.

    flash      the fused kernels: torch's flash attention on CUDA, its CPU kernel a document at a time
    documents  plain products, a document at a time: any device and dtype
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the documents' queries and keys are, the most that one document has of each, and the reach."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int = -1
    right: int = -1


def boundaries(cu: Tensor, tokens: int, function: str = "packed_attention") -> list[tuple[int, int]]:
    """Read boundaries on the host, and check that they cover the row."""
    at = cu.tolist()
    if at[:1] != [0] or at[-1] != tokens or at != sorted(at):
        raise ValueError(
            f"{function}: cu_seqlens are {at if len(at) < 6 else [*at[:2], '...', *at[-2:]]} for {tokens} tokens; "
            "they rise from 0 to the number of tokens: pass packed.cu_seqlens_padded"
        )
    return list(itertools.pairwise(at))


def pairs(q: Tensor, k: Tensor, rows: Rows) -> list[tuple[slice, slice]]:
    """Return the rows of queries and of keys of each document that has queries."""
    of_q, of_k = boundaries(rows.cu_q, len(q)), boundaries(rows.cu_k, len(k))
    return [(slice(*a), slice(*b)) for a, b in zip(of_q, of_k, strict=True) if a[1] > a[0]]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of the key head that it shares."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def lay_rows(x: Tensor) -> Tensor:
    """Lay the elements of each head side by side: the CUDA kernel insists on it, the CPU's takes it for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def reach_mask(n: int, m: int, rows: Rows, device: torch.device) -> Tensor | None:
    """Return which of m keys each of n queries sees, [n, m]; None if all."""
    left, right = rows.left, rows.right
    if (left < 0 or left >= m - 1) and (right < 0 or right >= n - 1):
        return None
    back = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    seen = torch.ones(n, m, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= back <= left
    if right >= 0:
        seen &= back >= -right
    return seen


def _cpu_mask(n: int, m: int, rows: Rows, like: Tensor) -> tuple[Tensor | None, bool]:
    """Return the CPU kernel's mask to add to the scores, or that it is causal, which needs none."""
    if rows.right == 0 and n == m and (rows.left < 0 or rows.left >= n - 1):
        return None, True
    seen = reach_mask(n, m, rows, like.device)
    mask = None if seen is None else torch.zeros(n, m, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
    return mask, False


# torch's flash kernel for the CPU has no public name; test_attention.py fails clearly should it go.
def cpu_forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with equal numbers of heads: the output [T, heads, head_dim] and its logsumexp [heads, T]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    q, k, v = lay_rows(q), lay_rows(k), lay_rows(v)
    for a, b in pairs(q, k, rows):
        qd, kd, vd = (x.transpose(0, 1)[None] for x in (q[a], k[b], v[b]))
        mask, causal = _cpu_mask(qd.shape[2], kd.shape[2], rows, q)
        y, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qd, kd, vd, 0.0, causal, attn_mask=mask, scale=scale
        )
        out[a] = y[0].transpose(0, 1)
        lse[:, a] = s[0]
    return out, lse


def cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of the output back to q, k and v."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    g, q, k, v = lay_rows(g), lay_rows(q), lay_rows(k), lay_rows(v)
    for a, b in pairs(q, k, rows):
        gd, qd, kd, vd, od = (x.transpose(0, 1)[None] for x in (g[a], q[a], k[b], v[b], out[a]))
        mask, causal = _cpu_mask(qd.shape[2], kd.shape[2], rows, q)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gd, qd, kd, vd, od, lse[None, :, a].contiguous(), 0.0, causal, attn_mask=mask, scale=scale
        )
        for whole, at, part in zip((dq, dk, dv), (a, b, b), parts, strict=True):
            whole[at] = part[0].transpose(0, 1)
    return dq, dk, dv


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = lay_rows(q), lay_rows(k), lay_rows(v)
    causal = (rows.left, rows.right) == (-1, 0)
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, 0.0, causal, False,
        scale=scale, window_size_left=rows.left, window_size_right=rows.right,
    )  # fmt: skip
    return y, lse


def _cuda_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, out = (lay_rows(x) for x in (g, q, k, v, out))
    causal = (rows.left, rows.right) == (-1, 0)
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout of 0
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        g, q, k, v, out, lse.contiguous(), rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, 0.0, causal, none, none[:0],
        scale=scale, window_size_left=rows.left, window_size_right=rows.right,
    )  # fmt: skip
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, rows: Rows, scale: float) -> Tensor:
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    seen = reach_mask(len(q), len(k), rows, q.device)
    return s if seen is None else s.masked_fill(~seen, -torch.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for a, b in pairs(q, k, rows):
        s = _scores(q[a], k[b], rows, scale)
        lse[:, a] = s.logsumexp(-1)
        out[a] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[b])
    return out, lse


def _plain_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    g, q, k, v, out = (x.to(wide) for x in (g, q, k, v, out))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b in pairs(q, k, rows):
        p = (_scores(q[a], k[b], rows, scale) - lse[:, a, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", g[a], v[b])
        ds = p * (dp - (g[a] * out[a]).sum(-1).t()[..., None]) * scale
        dq[a] = torch.einsum("hqk,khd->qhd", ds, k[b])
        dk[b] = torch.einsum("hqk,qhd->khd", ds, q[a])
        dv[b] = torch.einsum("hqk,qhd->khd", p, g[a])
    return dq, dk, dv


def best(q: Tensor) -> str:
    """Return the fastest kernel that fits device and dtype."""
    on_cuda = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    return "flash" if on_cuda or q.device.type == "cpu" else "documents"


def run(kernel: str, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: the output [T, heads, head_dim], and its logsumexp [heads, T] in float32 at least."""
    if kernel == "flash" and q.device.type == "cuda":
        return _cuda_forward(q, k, v, rows, scale)
    one = cpu_forward if kernel == "flash" else _plain_forward
    return one(q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), rows, scale)


def pull(
    kernel: str, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys contribute to the gradients of q, k and v; ``out`` and ``lse`` are those of all keys."""
    if kernel == "flash" and q.device.type == "cuda":
        return _cuda_backward(g, q, k, v, out, lse, rows, scale)
    one = cpu_backward if kernel == "flash" else _plain_backward
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = one(g, q, repeat_heads(k, heads), repeat_heads(v, heads), out, lse, rows, scale)
    dk, dv = (x.view(len(x), kv_heads, heads // kv_heads, x.shape[2]).sum(2) for x in (dk, dv))
    return dq, dk, dv
