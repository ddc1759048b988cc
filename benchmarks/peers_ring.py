"""torch's context parallelism beside cp_attention: one causal document, the same queries, keys and values, chunks alike.

Two ways into torch's ring. Its loop over the ranks (`_templated_ring_attention`, private) runs any attention on a block:
with dense float64 operations it runs anywhere, and can be compared to the last digits. The public `context_parallel`
exchanges F.scaled_dot_product_attention, and has kernels for CUDA alone; in bfloat16 both are compared with one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peers_model import Named, Row, compare
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import fstep

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def dense_forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attend within one block; return the output and the logsumexp of the scores."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value, lse


def dense_backward(
    *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one block, given the output and logsumexp of all blocks."""
    scale = query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    p = (scores - logsumexp[..., None]).exp()
    ds = p * (grad_out @ value.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
    return ds @ key, ds.mT @ query, p.mT @ grad_out


class TorchRing(torch.autograd.Function):
    """torch's ring over [1, heads, tokens, head_dim] with dense operations on each block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Any, cp: Any) -> Tensor:
        """Go round once with keys and values."""
        out, lse = cp._templated_ring_attention(group, 2, dense_forward, q, k, v, is_causal=True)
        ctx.group, ctx.cp = group, cp
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Go round again, with the gradients of keys and values too."""
        rest = (grads[0], "grad_out", *ctx.saved_tensors)
        back = ctx.cp._templated_ring_attention_backward(ctx.group, 2, dense_backward, *rest, is_causal=True)
        return (*back[:3], None, None)


def draw(tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Draw q, k, v [tokens, heads, head_dim] and the gradient of the output."""
    key = fstep.Key.seed(5)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return tuple(key.fold_in(i).normal((tokens, h, HEAD_DIM), dtype=dtype).to(device) for i, h in enumerate(heads))


def rows_of(x: Tensor) -> Tensor:
    """Lay [tokens, heads, head_dim] out as torch wants it, with as many key heads as query heads."""
    return x.repeat_interleave(HEADS // x.shape[1], dim=1).transpose(0, 1)[None]


def pull(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Named]:
    """Return the loss <g, attend(q, k, v)>, the output and the gradients."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    y = attend(q, k, v)
    loss = (y * g).double().sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return loss.detach(), {"out": y.detach(), "dq": dq, "dk": dk, "dv": dv}


def mine_of(x: Tensor, mesh: fstep.Mesh) -> Tensor:
    """Return this rank's two chunks of a document, one from the front and one from the back."""
    chunks = x.chunk(2 * mesh.cp.size)
    return torch.cat([chunks[mesh.cp.rank], chunks[2 * mesh.cp.size - 1 - mesh.cp.rank]])


def total(loss: Tensor, mesh: fstep.Mesh) -> Tensor:
    """Add the ranks' losses up."""
    return fstep.psum(loss, axis=mesh.cp)


def ours(method: str, mesh: fstep.Mesh, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run cp_attention on this rank's part of one document."""
    cu = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    return fstep.cp_attention(q, k, v, cu, axis=mesh.cp, max_seqlen=len(q), method=method)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to one whole document with torch's own function."""
    whole = (rows_of(x).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(*whole, is_causal=True)[0].transpose(0, 1)  # type: ignore[misc, arg-type]


def torch_ring(ranks: DeviceMesh, single: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run torch's ring on this rank's part; ``single`` says whether it adds blocks up in float32, as by default."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    cp._cp_options.convert_to_f32 = single
    y: Tensor = TorchRing.apply(rows_of(q), rows_of(k), rows_of(v), ranks.get_group(), cp)  # type: ignore[no-untyped-call]
    return y[0].transpose(0, 1)


def exact(mesh: fstep.Mesh, device: str, ranks: DeviceMesh, part: str, tokens: int) -> list[Row]:
    """Compare in float64 with torch's ring, and with one process."""
    q, k, v, g = draw(tokens, torch.float64, device)
    here = [mine_of(x, mesh) for x in (q, k, v, g)]
    whole_loss, whole = pull(sdpa, q, k, v, g)
    alone = (whole_loss, {name: mine_of(x, mesh) for name, x in whole.items()})
    found: list[tuple[Tensor, Named]] = []
    rows = []
    try:
        for single in (False, True):
            loss, leaves = pull(partial(torch_ring, ranks, single), *here)
            found.append((total(loss, mesh), leaves))
    except (ImportError, AttributeError, TypeError) as error:
        rows.append(Row(part, "torch ring", note=f"torch {torch.__version__} has no such ring: {error}"))
    else:
        note = "the peer by default, which adds in float32, and one process"
        rows.append(compare(part, "torch ring", found[1], alone, note))
        rows[0].equal = False
    for method in ("ring", "allgather", "ulysses") if HEADS % mesh.size == 0 else ("ring", "allgather"):
        loss, leaves = pull(partial(ours, method, mesh), *here)
        result = (total(loss, mesh), leaves)
        if found:
            rows.append(compare(part, "torch ring, adding in float64", result, found[0], f'cp_attention, method="{method}"'))
        rows.append(compare(part, "SDPA of one process", result, alone, f'cp_attention, method="{method}"'))
    return rows


def public(mesh: fstep.Mesh, device: str, ranks: DeviceMesh, part: str, tokens: int) -> list[Row]:
    """Compare `context_parallel` and cp_attention in bfloat16, each with one process in float64."""
    peer = "context_parallel"
    if device != "cuda":
        return [Row(part, peer, note="not run: torch's SDPA ring has kernels for CUDA alone")]
    try:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        return [Row(part, peer, note=f"torch {torch.__version__} has none: {error}")]
    q, k, v, g = (x.bfloat16() for x in draw(tokens, torch.float64, device))
    loss, leaves = pull(sdpa, *(x.double() for x in (q, k, v, g)))
    alone = (loss, {name: mine_of(x, mesh) for name, x in leaves.items()})

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Looked up when called: the context has put its own function there.
        return sdpa(q, k, v)

    rows = []
    here = [mine_of(x, mesh) for x in (q, k, v, g)]
    marker = torch.arange(tokens, device=device)[None]
    order = marker.clone()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), context_parallel(ranks, buffers=[order], buffer_seq_dims=[1]):
        if not torch.equal(order[0], mine_of(marker[0], mesh)):
            return [Row(part, peer, note="deals other tokens to the ranks than its documentation says")]
        loss, leaves = pull(theirs, *here)
    rows.append(compare(part, peer, (total(loss, mesh), leaves), alone, "the peer in bfloat16, and one process in float64"))
    loss, leaves = pull(partial(ours, "ring", mesh), *here)
    rows.append(
        compare(part, "SDPA of one process", (total(loss, mesh), leaves), alone, "cp_attention in bfloat16, likewise")
    )
    for row in rows:
        row.equal = False
    return rows


def context(mesh: fstep.Mesh, device: str, tokens: int = 48) -> list[Row]:
    """Compare the attention of one causal document spread over the ranks; the peer knows no document boundaries."""
    ranks = init_device_mesh(device, (mesh.size,))
    part = f"context, {mesh.size} ranks"
    tokens = -(-tokens // (2 * mesh.size)) * 2 * mesh.size
    return exact(mesh, device, ranks, part, tokens) + public(mesh, device, ranks, part, 64 * tokens)
