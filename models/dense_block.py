"""One layer of a dense decoder: attention over the documents of a row, and a gated MLP, each beside what it adds to.

x += o( attention( rope(norm(q(h))), rope(norm(k(h))), v(h) ) )     h = rms_norm(x)
x += down( act(gate(h)) * up(h) )                                    h = rms_norm(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fstep
from fstep import Mesh
from fstep_models.dense_config import ACTIVATIONS

if TYPE_CHECKING:
    from fstep_models.dense import Dense

Params = dict[Any, Any]


def qkv(p: Params, h: Tensor, cos: Tensor, sin: Tensor, model: Dense, mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys and values of this rank's heads, for all tokens [T, dim]."""
    c, tp = model.config, mesh.tp
    q = fstep.linear(h, p["q"], p.get("q_bias")).view(-1, c.heads // tp.size, c.head_dim)
    k = fstep.linear(h, p["k"], p.get("k_bias")).view(len(h), -1, c.head_dim)
    v = fstep.linear(h, p["v"], p.get("v_bias")).view(len(h), -1, c.head_dim)
    if c.kv_heads % tp.size:  # fewer key heads than ranks: every rank has them all, and uses the one of its queries
        mine = tp.rank * c.kv_heads // tp.size
        k, v = k[:, mine : mine + 1], v[:, mine : mine + 1]
    if "q_norm" in p:
        q, k = fstep.rms_norm(q, p["q_norm"], eps=c.eps), fstep.rms_norm(k, p["k_norm"], eps=c.eps)
    return fstep.rotate(q, cos, sin), fstep.rotate(k, cos, sin), v


def mlp(p: Params, h: Tensor, model: Dense) -> Tensor:
    """Make this rank's part of the hidden features, for all tokens [T, dim]."""
    gate, up = fstep.linear(h, p["gate"], p.get("gate_bias")), fstep.linear(h, p["up"], p.get("up_bias"))

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[model.config.act](gate) * up

    # The largest that a block would remember, and two pointwise operations make it again: where they are compiled into the
    # kernel that reads gate and up anyway, for a quarter of a percent of a step's time.
    return (fstep.remat(gated) if torch.compiler.is_compiling() else gated)(gate, up)


def block(
    layer: Params,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int,
    model: Dense,
    mesh: Mesh,
    *,
    pieces: tuple[Callable[..., Any], ...] = (fstep.rms_norm, qkv, mlp),
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run one decoder layer on this rank's tokens [ceil(T / tp), dim]; attention sees all T of them, of some heads.

    ``attend(q, k, v)`` stands for attention within the row where there is more to see, or to remember: in a cache.
    """
    norm, project, feed = pieces
    eps, tokens = model.config.eps, len(cos)
    p = fstep.cast(layer, model.dtype)
    h = fstep.tp_gather(norm(x, p["attn_norm"], eps=eps), axis=mesh.tp, tokens=tokens)
    q, k, v = project(p, h, cos, sin, model, mesh)
    if attend is None:
        how: dict[str, Any] = {"method": model.context, "kernel": model.attention}
        y = fstep.cp_attention(q, k, v, cu_seqlens, axis=mesh.cp, max_seqlen=max_seqlen, window=window, **how)
    else:
        y = attend(q, k, v)
    x = x + fstep.tp_row_linear(y.flatten(1), p["o"], p.get("o_bias"), axis=mesh.tp)
    h = fstep.tp_gather(norm(x, p["mlp_norm"], eps=eps), axis=mesh.tp, tokens=tokens)
    return x + fstep.tp_row_linear(feed(p, h, model), p["down"], p.get("down_bias"), axis=mesh.tp)
