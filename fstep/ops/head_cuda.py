"""The head's passes over logits as Triton kernels: each reads a chunk once, row by row, and writes what it is asked for.

    summarize       a program a row, block after block    m, s = max(m, x), s exp(m - max(m, x)) + sum(exp(x - max(m, x)))
    differentiate   a program for each block of a row     d = g (onehot - p) - h p (log p + entropy), over temperature
    scale_          a program a block                     x = f x, and nothing if f is 1

Imported on CUDA only, from `fstep.ops.head_passes`, which says what they compute.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # as with torch for the CPU; then nobody calls what is here
    triton = tl = None

BLOCK = 4096
WARPS = 8


@cache
def _compiled(kernel: Callable[..., None]) -> Any:
    return triton.jit(kernel)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the tensor is, not on the process's current GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Kernels have no annotations but tl.constexpr: Triton would look for the others' names.


def _summarize(
    logits, stride, here, top, sums, rows, columns, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m = -float("inf")
    s = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < columns, other=-float("inf")) * scale
        largest = tl.maximum(m, tl.max(x, 0))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        lower = tl.where(m == -float("inf"), 0.0, m - base)  # before the first logit there is nothing to lower
        e = tl.exp(x - base)
        if ENTROPY:
            q = tl.exp(lower) * (q + lower * s) + tl.where(at < columns, e * (x - base), 0.0)
        s = tl.exp(lower) * s + e
        m = largest
    base = tl.where(m == -float("inf"), 0.0, m)
    label = tl.load(here + row)
    z = tl.load(logits + row * stride + label, mask=label >= 0, other=0.0) * scale - base
    tl.store(top + row, m)
    tl.store(sums + row, tl.sum(s, 0))
    tl.store(sums + rows + row, tl.sum(q, 0))
    tl.store(sums + 2 * rows + row, tl.where(label >= 0, z, 0.0))


def summarize(logits: Tensor, here: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit, and [3, n]: sum of exp, its moment, the label's logit less the largest."""
    rows, columns = logits.shape
    top, sums = logits.new_empty(rows), logits.new_empty(3, rows)
    if rows:
        with _on(logits):
            _compiled(_summarize)[(rows,)](
                logits, logits.stride(0), here.contiguous(), top, sums, rows, columns, 1 / temperature,
                ENTROPY=entropy, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return top, sums


def _differentiate(
    logits, stride, here, lse, g, h, entropy, out, out_stride, columns, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label, g_row, lse_row = tl.load(here + row), tl.load(g + row), tl.load(lse + row)
    alive = g_row != 0
    if ENTROPY:
        h_row, entropy_row = tl.load(h + row), tl.load(entropy + row)
        alive = alive | (h_row != 0)
    end = tl.where(alive, columns, 0)  # of a row that is dropped nothing is read
    x = tl.load(logits + row * stride + at, mask=at < end, other=0.0)
    logp = x * scale - lse_row
    slope = g_row
    if ENTROPY:
        slope += h_row * (logp + entropy_row)
    d = -tl.exp(logp) * slope
    d = (d + tl.where(at == label, g_row, 0.0)) * scale
    d = tl.where(at < end, d, 0.0)
    tl.store(out + row * out_stride + at, d.to(out.dtype.element_ty), mask=at < columns)


def differentiate(
    logits: Tensor, here: Tensor, lse: Tensor, g: Tensor, h: Tensor | None, entropy: Tensor | None, temperature: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the products to ``out``."""
    rows, columns = logits.shape
    if rows and columns:
        blocks = -(-columns // BLOCK)
        with _on(logits):
            _compiled(_differentiate)[(rows, blocks)](
                logits, logits.stride(0), here.contiguous(), lse.contiguous(), g.contiguous(),
                g if h is None else h.contiguous(), g if entropy is None else entropy.contiguous(), out, out.stride(0),
                columns, 1 / temperature, ENTROPY=h is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def _scale(x, count, factor, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + at, mask=at < count) * f
        tl.store(x + at, y.to(x.dtype.element_ty), mask=at < count)


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply contiguous memory by a 0-d tensor on the device, in place."""
    if x.numel():
        with _on(x):
            _compiled(_scale)[(-(-x.numel() // BLOCK),)](x, x.numel(), factor, BLOCK=BLOCK, num_warps=WARPS)
