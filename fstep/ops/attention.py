"""Attention over packed documents: each token sees the earlier tokens of its own document, at most ``window`` of them.

    q_THD  [T, heads, head_dim]      T tokens of all documents, end to end
    k_THD  [T, kv_heads, head_dim]   kv_heads divides heads (grouped queries)
    cu     [D+1] int32               document d is rows cu[d] .. cu[d+1]

Which kernel computes it does not change the result:

    flash      torch's fused kernel: varlen attention on CUDA (half precision), one call a document on the CPU
    dense      documents of one length as a batch: cuDNN on CUDA (half precision), one call on the CPU
    fa4        the package flash-attn-4, on Hopper and Blackwell (half precision)
    documents  one scaled_dot_product_attention a document: any device and dtype, but it reads `cu` on the host
    math       plain operations with a [T, T] mask: differentiable any number of times, and under torch.func

The first three need no [T, T] matrix and are one operation, ``torch.ops.fstep.attend``, opaque to torch.compile. Which of
them is the fastest, `kernels.choose` decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fstep.ops.kernels import FUSED, is_fused, pull, run
from fstep.ops.rows import Rows, boundaries, pairs, reach_mask, repeat_heads
from fstep.trace import in_transform

METHODS = ("auto", *FUSED, "documents", "math")


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


# One operation for every fused kernel, forward and backward. torch.compile does not look into it, so that the kernel is
# chosen when it runs, by the sizes of that row: a graph serves all rows.
@torch.library.custom_op("fstep::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Attention of [T, heads, head_dim] tensors, and its logsumexp [heads, T]."""
    out, lse = run(kernel, q, k, v, Rows(cu_q, cu_k, max_q, max_k, left, right), scale)
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("fstep::attend_backward", mutates_args=())
def _attend_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = pull(kernel, g, q, k, v, out, lse, Rows(cu_q, cu_k, max_q, max_k, left, right), scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _pull(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(g, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        f"packed_attention: method {ctx.kernel!r} can be differentiated once; pass method='math' to do it again"
    )


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.kernel = inputs[-1]


_attend.register_autograd(_pull, setup_context=_save)
_attend_backward.register_autograd(_refuse, setup_context=_remember)


def causal(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: int) -> Rows:
    """Return the rows of queries that see what is before them, at most ``window`` places, themselves included."""
    return Rows(cu_q, cu_k, max_q, max_k, window - 1, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, scale: float, method: str) -> Tensor:
    """Causal attention of each document's queries, which are its last places, over all its keys."""
    if method == "auto":
        method = "math" if in_transform() else "auto" if is_fused(q) else "documents"
    if method == "math":
        return _attend_math(q, k, v, rows, scale)
    if method == "documents" and not torch.compiler.is_compiling():  # a graph cannot hold what is read on the host
        return _attend_documents(q, k, v, rows, scale)
    at = (rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, rows.left, rows.right)
    out: Tensor = _attend(q, k, v, *at, scale, method)[0]
    return out


def check_method(function: str, argument: str, method: str) -> None:
    """Refuse a kernel that is not there, or not under torch.func."""
    if method not in METHODS:
        raise ValueError(f"{function}: {argument} {method!r} is unknown; pass one of {', '.join(METHODS)}")
    if method in FUSED and in_transform():
        raise ValueError(f"{function}: {argument} {method!r} does not run inside torch.func; pass 'auto' or 'math'")


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
    that fits device, dtype and lengths, and "math" inside torch.func. Only "math" can be differentiated twice.

    Raises ValueError for an unknown method or one that does not take these documents, shapes or heads that do not fit and,
    where they are on the host, boundaries that are not those of the row.

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
