"""FlashAttention 4, for documents of any lengths on Hopper and Blackwell: the optional package ``flash-attn-4``.

Both directions are plain functions: forward gives out the logsumexp, backward takes that of the whole. The package compiles
its kernels when they are first used, in every process, which takes half a minute.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fstep.ops.rows import Rows, lay_rows


def forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: the output [T, heads, head_dim] and its logsumexp [heads, T]."""
    q, k, v = lay_rows(q), lay_rows(k), lay_rows(v)
    out, lse, *_ = package()._flash_attn_fwd(q, k, v, return_lse=True, **_options(rows, scale))
    return out, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of the output back to q, k and v."""
    g, q, k, v, out = (lay_rows(x) for x in (g, q, k, v, out))
    fixed = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = package()._flash_attn_bwd(q, k, v, out, g, lse.contiguous(), deterministic=fixed, **_options(rows, scale))
    return dq, dk, dv


def _options(rows: Rows, scale: float) -> dict[str, Any]:
    """Say the rows in the package's words: None is without end, and causal a word of its own."""
    left, right = (None if n < 0 else n for n in (rows.left, rows.right))
    causal = left is None and right == 0
    reach = dict(causal=causal, window_size_left=left, window_size_right=None if causal else right)
    cu = dict(cu_seqlens_q=rows.cu_q, cu_seqlens_k=rows.cu_k, max_seqlen_q=rows.max_q, max_seqlen_k=rows.max_k)
    return dict(softmax_scale=scale, **reach, **cu)


@cache
def package() -> Any:
    """Import the package; ImportError if it cannot be."""
    from flash_attn.cute import interface

    return interface


@cache
def is_there() -> bool:
    """Say whether the package can be imported: one that is broken, in whatever way, is not there."""
    try:
        package()
    except Exception:
        return False
    return True


def why_not(q: Tensor) -> str | None:
    """Say what keeps this kernel from these heads and this device; None if nothing does."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "runs on Hopper and Blackwell"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[2] % 8 or not 8 <= q.shape[2] <= 128:
        return f"takes a head_dim that is a multiple of 8, up to 128, not {q.shape[2]}"
    return None if is_there() else "needs the package flash-attn-4, which cannot be imported: pip install flash-attn-4"
