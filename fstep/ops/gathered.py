"""Attention over gathered keys: every rank gets all keys and values, and attends with its own queries to those before them.

    rank r's queries     chunk r       chunk 2C-1-r
    their keys           0 .. r        0 .. 2C-1-r          of each document: both are documents of one call of the kernel

The call costs every rank the same, whatever the documents are. What was gathered is not kept but gathered again in the
backward pass, so that what a layer keeps does not grow with the row. There a rank's addends of all keys' gradients travel
as they come out of the kernel, and are added up in float32 where the keys are at home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.mesh import exchange as ex
from fstep.mesh.axis import Axis
from fstep.ops import zigzag
from fstep.ops.attention import attend, causal
from fstep.ops.kernels import FUSED, is_fused
from fstep.ops.rows import Rows
from fstep.trace import in_transform


@dataclass(frozen=True)
class Call:
    """What forward and backward have in common. ``at``: where the keys before each chunk are, among all ranks' rows."""

    axis: Axis
    at: Tensor
    rows: Rows
    scale: float
    kernel: str


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *, axis: Axis, max_seqlen: int, window: int, scale: float, kernel: str
) -> Tensor:
    """Attend over a row that is spread over ``axis``; see `cp_attention`, which has checked the arguments."""
    at, cu_k = zigzag.prefixes(cu, len(q), axis.rank, axis.size)
    chunks = (cu.diff() // 2).repeat_interleave(2)
    cu_q = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    half, last = max_seqlen // 2, (2 * axis.size - axis.rank) * (max_seqlen // 2)
    rows = causal(cu_q.to(cu.dtype), cu_k.to(cu.dtype), half, last, window)
    if kernel in FUSED or (kernel == "auto" and is_fused(q) and not in_transform()):
        out, _ = _Forward.apply(q, k, v, Call(axis, at, rows, scale, kernel))  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out
    kv = ex.all_gather(torch.stack([k, v], dim=1), axis, 0, "sum", "cp_attention")
    # A key lies before both chunks of queries or before one: index_select adds at most two gradients, in any order.
    k, v = kv.index_select(0, at).unbind(1)
    return attend(q, k, v, rows, scale=scale, method=kernel)


def _gather(k: Tensor, v: Tensor, call: Call, action: str) -> tuple[Tensor, Tensor]:
    """Return the keys and values before each chunk, each in memory of its own: kernels may count elements in 32 bits."""
    kv = ex.transport("cp_attention", call.axis).all_gather(torch.stack([k, v]), action=action).wait()
    flat, at = kv.flatten(0, 2), _in_pairs(call.at, len(k))
    return flat.index_select(0, at), flat.index_select(0, at + len(k))


def _in_pairs(at: Tensor, tokens: int) -> Tensor:
    """Say where places of the ranks' rows are if each rank has laid as many values behind its keys."""
    return at + at // tokens * tokens if tokens else at


def _add_at_home(dkv: Tensor, axis: Axis, action: str) -> Tensor:
    """Add everybody's gradients of this rank's keys and values; 16-bit ones are rounded once, as a sum."""
    return ex.transport("cp_attention", axis).all_to_all(dkv, action=action).wait().sum(0)


class _Forward(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        action = "cp_attention with gradient" if q.requires_grad or k.requires_grad or v.requires_grad else "cp_attention"
        k, v = _gather(k, v, call, action)
        out, lse = torch.ops.fstep.attend(q, k, v, *_options(call))
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *qkv, ctx.call = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*qkv, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
        grads: tuple[Tensor, ...] = _Backward.apply(g, *ctx.saved_tensors, ctx.call)  # type: ignore[no-untyped-call]
        return (*grads, None)


class _Backward(Function):
    @staticmethod
    def forward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        action, axis, tokens = "gradient of cp_attention", call.axis, len(k)
        shape = (axis.size, 2, *k.shape)
        k, v = _gather(k, v, call, action)
        dq, *addends = torch.ops.fstep.attend_backward(g, q, k, v, out, lse, *_options(call))
        del k, v
        dkv = g.new_zeros(shape)
        cu, lengths = call.rows.cu_k[:-1], call.rows.cu_k.diff()
        counts = (axis.rank + 1) * (tokens // 2), (2 * axis.size - axis.rank) * (tokens // 2)
        # A key may lie before both chunks: what comes from one is added to what came from the other. No index comes twice.
        early, late = (zigzag.ranges(cu[i::2], lengths[i::2], n) for i, n in enumerate(counts))
        flat, at = dkv.flatten(0, 2), _in_pairs(call.at, tokens)
        for i, x in enumerate(addends):
            flat[at[late] + i * tokens] = x[late]
            flat[at[early] + i * tokens] += x[early]
        del addends, x
        dk, dv = _add_at_home(dkv, axis, action)
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "cp_attention: gradients of a fused kernel can be taken once; pass method='allgather', kernel='math' to do it "
            "again"
        )


def _options(call: Call) -> tuple[Any, ...]:
    rows = call.rows
    return (rows.cu_q, rows.cu_k, rows.max_q, rows.max_k, rows.left, rows.right, call.scale, call.kernel)
