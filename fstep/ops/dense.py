"""Attention of documents of one length: a row of them is a batch as it lies in memory, and no boundary is looked at.

    [T, heads, head_dim] ──view──> [documents, length, heads, head_dim] ──transpose──> [documents, heads, length, head_dim]

On CUDA it is cuDNN's kernel, which reads these strides and grouped heads as they are; on the CPU torch's flash kernel, all
documents in one call. Both directions are plain functions: forward gives out the logsumexp, backward takes that of the
whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ops import flash
from fstep.ops.rows import Rows, boundaries, lay_rows


def forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: the output [T, heads, head_dim] and its logsumexp [heads, T]. The CPU wants equal numbers of heads."""
    documents, causal = _documents(q, rows), rows.right == 0
    heads, tokens = q.shape[1], len(q)
    q, k, v = (_batch(x, documents) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = flash.cpu_forward(q, k, v, causal, scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
    return _row(out), lse.view(lse.shape[:3]).transpose(0, 1).reshape(heads, tokens)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of the output back to q, k and v."""
    documents, causal = _documents(q, rows), rows.right == 0
    g, q, k, v, out = (_batch(x, documents) for x in (g, q, k, v, out))
    lse = lse.view(len(lse), documents, -1).transpose(0, 1).contiguous()
    if q.device.type == "cpu":
        dq, dk, dv = flash.cpu_backward(g, q, k, v, out, lse, causal, scale)
    else:
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, out, lse[..., None], none, none, None, None, None, rows.max_q, rows.max_k, 0.0, causal, scale=scale
        )
    return _row(dq), _row(dk), _row(dv)


def why_not(q: Tensor) -> str | None:
    """Say what keeps this kernel from these heads and this device; None if nothing does."""
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "runs on the CPU, and on Hopper and later"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16 on CUDA, not {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > 128:
        return f"takes a head_dim that is a multiple of 8, up to 128, not {q.shape[2]}"
    return None


def _documents(q: Tensor, rows: Rows) -> int:
    """Return how many documents there are. On the CPU boundaries that are not those of the row are refused."""
    documents = len(rows.cu_q) - 1
    if q.device.type == "cpu":
        for cu, longest in ((rows.cu_q, rows.max_q), (rows.cu_k, rows.max_k)):
            if (most := max(b - a for a, b in boundaries(cu, longest * documents))) > longest:
                raise ValueError(
                    f"packed_attention: max_seqlen is {longest} and a document has {most} places; pass packed.max_seqlen"
                )
    return documents


def _batch(x: Tensor, documents: int) -> Tensor:
    return lay_rows(x).view(documents, -1, *x.shape[1:]).transpose(1, 2)


def _row(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1).contiguous()
