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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fstep.trace import asked_while_tracing, in_transform

METHODS = ("auto", "flash", "documents", "math")


def _documents(cu: Tensor, tokens: int) -> list[tuple[int, int]]:
    at = cu.tolist()
    if at[:1] != [0] or at[-1] != tokens or at != sorted(at):
        raise ValueError(
            f"packed_attention: cu_seqlens are {at if len(at) < 6 else [*at[:2], '...', *at[-2:]]} for {tokens} tokens; "
            "they rise from 0 to the number of tokens: pass packed.cu_seqlens_padded"
        )
    return [(a, b) for a, b in pairwise(at) if b > a]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _window_mask(n: int, window: int, device: torch.device) -> Tensor:
    back = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return (back >= 0) & (back < window)


def _attend_math(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int, scale: float) -> Tensor:
    T, H = q.shape[:2]
    k, v = _repeat_heads(k, H), _repeat_heads(v, H)
    place = torch.arange(T, device=q.device)
    # cu[0] is 0; adding it lets vmap batch both alike.
    document = torch.searchsorted(cu.to(place.dtype), place + cu[0], right=True)
    back = place[:, None] - place
    seen = (document[:, None] == document) & (back >= 0)
    if window:
        seen = seen & (back < window)
    scores = torch.einsum("qhd,khd->hqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype), v)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int, scale: float) -> Tensor:
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    out = []
    for a, b in _documents(cu, len(q)):
        qd, kd, vd = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        mask = _window_mask(b - a, window, q.device) if 0 < window < b - a else None
        y = scaled_dot_product_attention(qd, kd, vd, attn_mask=mask, is_causal=mask is None, scale=scale)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


# The CPU kernel's own forward and backward, per document, behind one operation that torch.compile does not look into.
# (torch's flash kernel for the CPU has no public name; test_attention.py fails clearly should it go.)
def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
    )


def _cpu_flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
    )


def _rows(x: Tensor) -> Tensor:
    """Lay the elements of each head side by side: the CUDA kernel insists on it, the CPU's takes it for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _float_mask(n: int, window: int, like: Tensor) -> Tensor | None:
    if not 0 < window < n:
        return None
    return torch.zeros(n, n, dtype=like.dtype).masked_fill_(~_window_mask(n, window, like.device), -torch.inf)


@torch.library.custom_op("fstep::attend_cpu", mutates_args=(), device_types="cpu")
def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [T, heads, head_dim] tensors with equal heads, and its logsumexp [heads, T]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    q, k, v = _rows(q), _rows(k), _rows(v)
    for a, b in _documents(cu, len(q)):
        qd, kd, vd = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        y, s = _cpu_flash_forward(qd, kd, vd, _float_mask(b - a, window, q), scale)
        out[a:b] = y[0].transpose(0, 1)
        lse[:, a:b] = s[0]
    return out, lse


@_attend_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("fstep::attend_cpu_backward", mutates_args=(), device_types="cpu")
def _attend_cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    g, q, k, v = _rows(g), _rows(q), _rows(k), _rows(v)
    for a, b in _documents(cu, len(q)):
        gd, qd, kd, vd, od = (x[a:b].transpose(0, 1)[None] for x in (g, q, k, v, out))
        mask = _float_mask(b - a, window, q)
        parts = _cpu_flash_backward(gd, qd, kd, vd, od, lse[None, :, a:b].contiguous(), mask, scale)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            whole[a:b] = part[0].transpose(0, 1)
    return dq, dk, dv


@_attend_cpu_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu, ctx.window, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, cu, *output)


def _pull(ctx: torch.autograd.function.FunctionCtx, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _attend_cpu_backward(g, q, k, v, out, lse, cu, ctx.window, ctx.scale)  # type: ignore[attr-defined]
    return (*grads, None, None, None)


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


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_seqlen: int, window: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they are; later versions want to be told.
    grouped: dict[str, Any] = {"enable_gqa": True} if _varlen_takes_gqa() and q.shape[1] != k.shape[1] else {}
    back = (window - 1 if window else -1, 0)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = varlen_attn(q, k, v, cu, cu, max_seqlen, max_seqlen, window_size=back, scale=scale, **grouped)
    assert isinstance(out, Tensor)  # a tuple only if asked for more
    return out


def _best_method(q: Tensor) -> str:
    if in_transform():
        return "math"
    if q.device.type == "cpu":
        return "flash"
    half = q.dtype in (torch.bfloat16, torch.float16)
    return "flash" if q.device.type == "cuda" and half and q.shape[-1] <= 256 else "documents"


def _check(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_seqlen: int, window: int, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"packed_attention: method {method!r} is unknown; pass one of {', '.join(METHODS)}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or (len(q), q.shape[2]) != (len(k), k.shape[2]):
        raise ValueError(
            f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; they are "
            "[T, heads, head_dim], and [T, kv_heads, head_dim] twice"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if window < 0:
        raise ValueError(f"packed_attention: window is {window}; pass 0 for no window, or the number of tokens seen")
    if in_transform():
        if method == "flash":
            raise ValueError("packed_attention: method 'flash' does not run inside torch.func; pass 'auto' or 'math'")
    elif q.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a GPU looking would wait for the device, and there a short max_seqlen is silently a wrong answer.
        longest = max((b - a for a, b in _documents(cu, len(q))), default=0)
        if longest > max_seqlen:
            raise ValueError(
                f"packed_attention: max_seqlen is {max_seqlen} and a document has {longest} places; pass packed.max_seqlen"
            )


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
    _check(q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, window, method)
    heads, head_dim = q_THD.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    method = _best_method(q_THD) if method == "auto" else method
    if method == "math":
        return _attend_math(q_THD, k_THD, v_THD, cu_seqlens, window, scale)
    if method == "documents":
        return _attend_documents(q_THD, k_THD, v_THD, cu_seqlens, window, scale)
    if q_THD.device.type == "cuda":
        return _attend_cuda(q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, window, scale)
    k_THD, v_THD = _repeat_heads(k_THD, heads), _repeat_heads(v_THD, heads)
    return _attend_cpu(q_THD, k_THD, v_THD, cu_seqlens, window, scale)[0]
