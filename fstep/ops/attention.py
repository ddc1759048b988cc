"""Attention over packed documents: each token sees the earlier tokens of its own document, at most ``window`` of them.

    q_THD  [T, heads, head_dim]      T tokens of all documents, end to end
    k_THD  [T, kv_heads, head_dim]   kv_heads divides heads (grouped queries)
    cu     [D+1] int32               document d is rows cu[d] .. cu[d+1]

Which kernel computes it does not change the result:

    flash      the device's fused kernel: torch's varlen attention on CUDA (half precision), one fused call a document on
               the CPU; no [T, T] matrix, opaque to torch.compile
    documents  one scaled_dot_product_attention a document: any device and dtype, but it reads `cu` on the host
    math       plain operations with a [T, T] mask: differentiable any number of times, and under torch.func
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fstep.ops.kernels import Rows, best, boundaries, cpu_backward, cpu_forward, lay_rows, pairs, reach_mask, repeat_heads
from fstep.trace import asked_while_tracing, in_transform

METHODS = ("auto", "flash", "documents", "math")


def _attend_math(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    of_q, left_q = _from_the_end(rows.cu_q, len(q), q.device)
    of_k, left_k = (of_q, left_q) if rows.cu_k is rows.cu_q else _from_the_end(rows.cu_k, len(k), q.device)
    back = left_k - left_q[:, None]
    seen = (of_q[:, None] == of_k) & (back >= 0)
    if rows.left >= 0:
        seen = seen & (back <= rows.left)
    scores = torch.einsum("qhd,khd->hqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype), v)


def _from_the_end(cu: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each place its document, counted from 1, and how many places there are from it to the document's end."""
    place = torch.arange(tokens, device=device)
    cu = cu.to(place.dtype)
    document = torch.searchsorted(cu, place + cu[0], right=True)  # cu[0] is 0; adding it lets vmap batch both alike
    return document, cu[document] - place


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    out = []
    for a, b in pairs(q, k, rows):
        qd, kd, vd = (x.transpose(0, 1)[None] for x in (q[a], k[b], v[b]))
        n, m = qd.shape[2], kd.shape[2]
        mask = reach_mask(n, m, rows, q.device) if n != m or 0 <= rows.left < n - 1 else None
        y = scaled_dot_product_attention(qd, kd, vd, attn_mask=mask, is_causal=n == m and mask is None, scale=scale)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


# The CPU kernel behind one operation that torch.compile does not look into.
@torch.library.custom_op("fstep::attend_cpu", mutates_args=(), device_types="cpu")
def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of [T, heads, head_dim] tensors with equal heads, and its logsumexp [heads, T]."""
    return cpu_forward(q, k, v, causal(cu_q, cu_k, 0, 0, window), scale)


@_attend_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("fstep::attend_cpu_backward", mutates_args=(), device_types="cpu")
def _attend_cpu_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_backward(g, q, k, v, out, lse, causal(cu_q, cu_k, 0, 0, window), scale)


@_attend_cpu_backward.register_fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, ctx.window, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, cu_q, cu_k, *output)


def _pull(ctx: torch.autograd.function.FunctionCtx, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _attend_cpu_backward(g, q, k, v, out, lse, cu_q, cu_k, ctx.window, ctx.scale)  # type: ignore[attr-defined]
    return (*grads, None, None, None, None)


def _refuse(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> None:
    raise RuntimeError("packed_attention: method 'flash' can be differentiated once; pass method='math' to do it again")


_attend_cpu.register_autograd(_pull, setup_context=_save)
_attend_cpu_backward.register_autograd(_refuse)


@asked_while_tracing
def _varlen_takes_gqa() -> bool:
    return _has_enable_gqa()


@cache
def _has_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they are; later versions want to be told.
    grouped: dict[str, Any] = {"enable_gqa": True} if _varlen_takes_gqa() and q.shape[1] != k.shape[1] else {}
    q, k, v = lay_rows(q), lay_rows(k), lay_rows(v)
    reach = (rows.left, rows.right)
    out = varlen_attn(q, k, v, rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, window_size=reach, scale=scale, **grouped)
    assert isinstance(out, Tensor)  # a tuple only if asked for more
    return out


def causal(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: int) -> Rows:
    """Return the rows of queries that see what is before them, at most ``window`` places, themselves included."""
    return Rows(cu_q, cu_k, max_q, max_k, window - 1, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, scale: float, method: str) -> Tensor:
    """Causal attention of each document's queries, which are its last places, over all its keys."""
    method = _best_method(q) if method == "auto" else method
    if method == "math":
        return _attend_math(q, k, v, rows, scale)
    if method == "documents":
        return _attend_documents(q, k, v, rows, scale)
    if q.device.type == "cuda":
        return _attend_cuda(q, k, v, rows, scale)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return _attend_cpu(q, k, v, rows.cu_q, rows.cu_k, rows.left + 1, scale)[0]


def _best_method(q: Tensor) -> str:
    return "math" if in_transform() else best(q)


def check_method(function: str, argument: str, method: str) -> None:
    """Refuse a kernel that is not there, or not under torch.func."""
    if method not in METHODS:
        raise ValueError(f"{function}: {argument} {method!r} is unknown; pass one of {', '.join(METHODS)}")
    if method == "flash" and in_transform():
        raise ValueError(f"{function}: {argument} 'flash' does not run inside torch.func; pass 'auto' or 'math'")


def check_attention(function: str, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_seqlen: int, window: int) -> list[int]:
    """Refuse what does not fit, and return the documents' lengths if the host can know them without waiting."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or (len(q), q.shape[2]) != (len(k), k.shape[2]):
        raise ValueError(
            f"{function}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; they are "
            "[T, heads, head_dim], and [T, kv_heads, head_dim] twice"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{function}: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if window < 0:
        raise ValueError(f"{function}: window is {window}; pass 0 for no window, or the number of tokens seen")
    if in_transform() or q.device.type != "cpu" or torch.compiler.is_compiling():
        # On a GPU looking would wait for the device, and there a short max_seqlen is silently a wrong answer.
        return []
    lengths = [b - a for a, b in boundaries(cu, len(q), function)]
    if (longest := max(lengths, default=0)) > max_seqlen:
        raise ValueError(
            f"{function}: max_seqlen is {max_seqlen} and a document has {longest} places; pass packed.max_seqlen"
        )
    return lengths


def packed_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int = 0,
    scale: float | None = None,
    method: str = "auto",
) -> Tensor:
    """Causal attention within each document of a packed row; returns [T, heads, head_dim].

    Out of token i's own document, ``softmax_j(scale * q_i . k_j) v_j`` over j = i-window+1 .. i, or over all j <= i if
    ``window`` is 0. ``cu_seqlens`` are the boundaries in the row (``packed.cu_seqlens_padded``) and cover every place of
    it. ``scale`` defaults to ``head_dim ** -0.5``. ``method`` is a kernel (see the module's head); "auto" takes the fastest
    that fits device and dtype, and "math" inside torch.func. Only "math" can be differentiated twice.

    Raises ValueError for an unknown method, shapes or heads that do not fit and, where they are on the host, boundaries that
    are not those of the row.

    >>> import torch, fstep
    >>> q = torch.zeros(3, 2, 8)
    >>> v = torch.tensor([1.0, 3.0, 7.0])[:, None, None].expand(3, 1, 8).contiguous()
    >>> cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> fstep.packed_attention(q, v, v, cu, max_seqlen=2)[:, 0, 0]
    tensor([1., 2., 7.])
    """
    check_method("packed_attention", "method", method)
    check_attention("packed_attention", q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, window)
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    rows = causal(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window)
    return attend(q_THD, k_THD, v_THD, rows, scale=scale, method=method)
