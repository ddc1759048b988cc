"""The kernels of attention, each a plain forward and backward function, and which of them is taken.

With the logsumexp L of its scores a result over some of the keys can be joined to one over others, and the backward of a
part is that of the whole, given the whole's output and L. That is what a ring of ranks needs, and it makes every kernel's
backward fit every kernel's forward.

    fa4        FlashAttention 4, on Hopper and Blackwell where the package flash-attn-4 is installed
    dense      documents of one length as a batch: cuDNN on CUDA, torch's CPU kernel
    flash      torch's flash attention on CUDA, its CPU kernel a document at a time
    documents  plain products, a document at a time: any device and dtype

What queries see of which keys is said by `Rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ops import dense, fa4, flash
from fstep.ops.rows import Rows, even, pairs, reach_mask, repeat_heads, whole_reach

FUSED = ("flash", "dense", "fa4")
HALF = (torch.bfloat16, torch.float16)


def is_fused(q: Tensor) -> bool:
    """Say whether there is a fused kernel for this device and dtype."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in HALF and q.shape[2] <= 256)


def choose(q: Tensor, k: Tensor, rows: Rows) -> str:
    """Return the fastest kernel that is right for these shapes and this device; it looks at no value on the device.

    TFLOP/s of forward and backward on one H200, bfloat16, 16384 tokens, 32 query and 8 key heads of 128:

    ======  ======  =======  ========  ====  ======  =======
    .       8x2048  1x16384  11 mixed  Zipf  32x512  128x128
    ======  ======  =======  ========  ====  ======  =======
    flash   253     321      267       226   142     57
    dense   450     536      .         .     234     73
    fa4     466     601      551       398   213     55
    ======  ======  =======  ========  ====  ======  =======

    So fa4 where there is a document longer than its tiles of 128; for a batch of short documents dense. cuDNN plans each
    shape anew, which takes 100 ms: it gets lengths that are multiples of 128 only, of which there are few. Neither adds up
    the gradients of queries in a fixed order, so that ``torch.use_deterministic_algorithms`` means flash.
    """
    if not is_fused(q):
        return "documents"
    batch = _why_not("dense", q, k, rows) is None
    if q.device.type == "cpu":
        return "dense" if batch else "flash"
    if torch.are_deterministic_algorithms_enabled():
        return "flash"
    batch = batch and rows.max_q % 128 == 0 and rows.max_k % 128 == 0
    if rows.max_q > (512 if batch else 128) and _why_not("fa4", q, k, rows) is None:
        return "fa4"
    return "dense" if batch else "flash"


def _why_not(kernel: str, q: Tensor, k: Tensor, rows: Rows) -> str | None:
    """Say what keeps a kernel from these rows; None if nothing does."""
    if kernel == "fa4":
        return fa4.why_not(q)
    if kernel != "dense":
        return None
    if not even(q, k, rows):
        return f"takes documents of one length, and {len(rows.cu_q) - 1} of {rows.max_q} places are not {len(q)}"
    if not whole_reach(rows):
        return f"has no window, and this one is of {rows.left + 1} places"
    return dense.why_not(q)


def run(kernel: str, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: the output [T, heads, head_dim], and its logsumexp [heads, T] in float32 at least.

    Raises ValueError for a kernel that does not take these rows.
    """
    kernel = _taken(kernel, q, k, rows)
    if not _takes_groups(kernel, q):
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    forward = {"flash": flash.forward, "dense": dense.forward, "fa4": fa4.forward, "documents": _plain_forward}[kernel]
    return forward(q, k, v, rows, scale)


def pull(
    kernel: str, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys contribute to the gradients of q, k and v; ``out`` and ``lse`` are those of all keys."""
    kernel, heads, kv_heads = _taken(kernel, q, k, rows), q.shape[1], k.shape[1]
    backward = {"flash": flash.backward, "dense": dense.backward, "fa4": fa4.backward, "documents": _plain_backward}[kernel]
    if _takes_groups(kernel, q):
        return backward(g, q, k, v, out, lse, rows, scale)
    dq, dk, dv = backward(g, q, repeat_heads(k, heads), repeat_heads(v, heads), out, lse, rows, scale)
    if heads != kv_heads:
        dk, dv = (x.view(len(x), kv_heads, heads // kv_heads, x.shape[2]).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _taken(kernel: str, q: Tensor, k: Tensor, rows: Rows) -> str:
    if kernel == "auto":
        return choose(q, k, rows)
    if (why := _why_not(kernel, q, k, rows)) is not None:
        raise ValueError(f"packed_attention: method {kernel!r} {why}; pass method='auto'")
    return kernel


def _takes_groups(kernel: str, q: Tensor) -> bool:
    """Say whether a kernel shares key heads itself."""
    return q.device.type == "cuda" and kernel != "documents"


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
