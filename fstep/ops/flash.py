"""torch's own flash attention: for documents of any lengths one call on CUDA, and one call a document on the CPU.

Both directions are plain functions: forward gives out the logsumexp, backward takes that of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ops.rows import Rows, lay_rows, pairs, reach_mask


def forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: the output [T, heads, head_dim] and its logsumexp [heads, T]. The CPU wants equal numbers of heads."""
    q, k, v = lay_rows(q), lay_rows(k), lay_rows(v)
    if q.device.type == "cpu":
        return _cpu_forward(q, k, v, rows, scale)
    causal = (rows.left, rows.right) == (-1, 0)
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, 0.0, causal, False,
        scale=scale, window_size_left=rows.left, window_size_right=rows.right,
    )  # fmt: skip
    return y, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of the output back to q, k and v."""
    g, q, k, v, out = (lay_rows(x) for x in (g, q, k, v, out))
    if q.device.type == "cpu":
        return _cpu_backward(g, q, k, v, out, lse, rows, scale)
    causal = (rows.left, rows.right) == (-1, 0)
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout of 0
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        g, q, k, v, out, lse.contiguous(), rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, 0.0, causal, none, none[:0],
        scale=scale, window_size_left=rows.left, window_size_right=rows.right,
    )  # fmt: skip
    return dq, dk, dv


# torch's flash kernel for the CPU has no public name; test_attention.py fails clearly should it go.
def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend within each of a batch of documents [documents, heads, length, head_dim]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def cpu_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient of a batch back."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _cpu_mask(n: int, m: int, rows: Rows, like: Tensor) -> tuple[Tensor | None, bool]:
    """Return the CPU kernel's mask to add to the scores, or that it is causal, which needs none."""
    if rows.right == 0 and n == m and (rows.left < 0 or rows.left >= n - 1):
        return None, True
    seen = reach_mask(n, m, rows, like.device)
    mask = None if seen is None else torch.zeros(n, m, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
    return mask, False


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for a, b in pairs(q, k, rows):
        qd, kd, vd = (x.transpose(0, 1)[None] for x in (q[a], k[b], v[b]))
        mask, causal = _cpu_mask(qd.shape[2], kd.shape[2], rows, q)
        y, s = cpu_forward(qd, kd, vd, causal, scale, mask)
        out[a] = y[0].transpose(0, 1)
        lse[:, a] = s[0]
    return out, lse


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for a, b in pairs(q, k, rows):
        gd, qd, kd, vd, od = (x.transpose(0, 1)[None] for x in (g[a], q[a], k[b], v[b], out[a]))
        mask, causal = _cpu_mask(qd.shape[2], kd.shape[2], rows, q)
        parts = cpu_backward(gd, qd, kd, vd, od, lse[None, :, a], causal, scale, mask)
        for whole, at, part in zip((dq, dk, dv), (a, b, b), parts, strict=True):
            whole[at] = part[0].transpose(0, 1)
    return dq, dk, dv
