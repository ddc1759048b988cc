"""The same training step as somebody writes it who wants one model on one GPU, and speed: torch and nothing else.

    parameters    float32, cast to bfloat16 inside the layer, where the compiler sees it
    layers        compiled, once for all; with remat the checkpoint is inside what is compiled
    attention     varlen_attn on the packed row, or, where all documents are of one length, SDPA (cuDNN) on a batch of them
    head          compiled: all logits at once in bfloat16, cross_entropy in float32 in the kernels that read them

With "kernels" attention and head are fstep's, and the two differ in what a step of pure functions adds to a loop.

Documents are of one length here, so positions and boundaries are made once, outside of the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from job import Job, Named, Names, Step, module_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fstep
from fstep.tree import tree_leaves, tree_paths
from fstep_models.dense import Config

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(doc: int) -> Attend:
    """Return causal attention over documents of ``doc`` tokens, as a batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(-1, doc, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2).flatten(0, 1)

    return attend


def varlen(cu: Tensor, longest: int) -> Attend:
    """Return causal attention over the documents of a row, by torch's kernel; on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    takes_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more: dict[str, Any] = {"enable_gqa": True} if takes_flag and q.shape[1] != k.shape[1] else {}
        y = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **more)
        assert isinstance(y, Tensor)
        return y

    return attend


def of_fstep(cu: Tensor, longest: int) -> Attend:
    """Return fstep's attention over the documents of a row."""
    return lambda q, k, v: fstep.packed_attention(q, k, v, cu, max_seqlen=longest)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [T, heads, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Config, weights: dict[str, Tensor], attend: Attend) -> None:
        super().__init__()
        self.head_dim, self.eps, self.attend = config.head_dim, config.eps, attend
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the hidden states [T, dim] after this layer."""
        w = {name: p.to(x.dtype) for name, p in self.named_parameters()}
        h = F.rms_norm(x, x.shape[-1:], w["attn_norm"], self.eps)
        q, k, v = (F.linear(h, w[name]).view(len(h), -1, self.head_dim) for name in "qkv")
        if "q_norm" in w:
            q, k = (F.rms_norm(y, y.shape[-1:], w[name], self.eps) for y, name in ((q, "q_norm"), (k, "k_norm")))
        y = self.attend(turn(q, cos, sin), turn(k, cos, sin), v)
        x = x + F.linear(y.flatten(1), w["o"])
        h = F.rms_norm(x, x.shape[-1:], w["mlp_norm"], self.eps)
        return x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])


def head_loss(x: Tensor, norm: Tensor, weight: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Sum the cross entropies of the labels that count."""
    h = F.rms_norm(x, x.shape[-1:], norm.to(x.dtype), eps)
    logits = F.linear(h, weight.to(x.dtype))
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum")


def head_loss_of_fstep(x: Tensor, norm: Tensor, weight: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Sum the same by fstep's head, which never holds all logits."""
    h = fstep.rms_norm(x, norm.to(x.dtype), eps=eps)
    return -fstep.token_logprob_sum(h, weight, labels, torch.ones_like(labels, dtype=torch.float32))


def hand(job: Job, batch: fstep.Packed, attention: str) -> tuple[Step, Callable[[], Named]]:
    """Return the step on one row of documents of one length; ``attention`` is "varlen", "dense" or "kernels"."""
    config, params = job.config, job.params()
    doc = batch.max_seqlen
    cu = batch.cu_seqlens_padded
    attend = {"varlen": lambda: varlen(cu, doc), "dense": lambda: dense(doc), "kernels": lambda: of_fstep(cu, doc)}[
        attention
    ]()
    layers = [Layer(config, params["layers"][i], attend) for i in range(config.layers)]
    outer = {name: nn.Parameter(params[name]) for name in ("embed", "norm", "head") if isinstance(params[name], Tensor)}
    embed, norm, head = outer["embed"], outer["norm"], outer.get("head", outer["embed"])
    table = dict(outer)
    for i, layer in enumerate(layers):
        table |= {f"layers.{i}.{name}": p for name, p in layer.named_parameters()}
    names = Names({path: table[path] for path in tree_paths(params)})
    assert len(tree_leaves(params)) == len(table)
    del params

    angles = batch.positions[:, None] * config.rope.frequencies().to(job.device)
    cos, sin = (f(angles).to(job.low)[:, None] for f in (torch.cos, torch.sin))
    weight = batch.weights.sum()

    def run(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if job.remat == "full":
            return checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return layer(x, cos, sin)

    run_layer, run_head = job.compiled(run), job.compiled(head_loss)
    if attention == "kernels":
        run_head = head_loss_of_fstep

    def backward() -> Tensor:
        x = F.embedding(batch.tokens, embed).to(job.low)
        for layer in layers:
            x = run_layer(layer, x, cos, sin)
        loss = run_head(x, norm, head, batch.labels, config.eps) / weight
        loss.backward()
        return loss.detach()

    return module_step(job, names, backward)
