"""The modules of one `Job` over several GPUs by FSDP2 (fully_shard): with fstep's functions inside, by hand, torchtitan's.

    same        the block and the head of fstep's model, compiled as there: parameters come and gradients go another way
    fsdp2       the layers and the head of by_hand.py, each layer compiled: what one writes who has torch and nothing else
    titan       torchtitan's module, its apply_compile and its apply_fsdp

All keep float32 parameters, gather them in ``job.low``, sum gradients in ``reduce``, clip with torch's clip_grad_norm_ and
take a step of torch's fused AdamW. Embedding, each layer, and norm with head are gathered by themselves, as torchtitan does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from by_hand import Layer, dense, head_loss
from job import BETAS, EPS, Job, Named, Step
from peers_modules import rows_of, titan_compiled, titan_with_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import fstep
from fstep_models.dense_parts import tables


class Embed(nn.Module):
    """The embedding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of these tokens."""
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    """The last norm, and the head with its loss."""

    def __init__(self, norm: Tensor, weight: Tensor, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.weight, self.run = nn.Parameter(norm), nn.Parameter(weight), run

    def forward(self, x: Tensor) -> Tensor:
        """Return the summed loss."""
        return self.run(x, self.norm, self.weight)


class Block(nn.Module):
    """The parameters of one layer, and the function that is called with them."""

    def __init__(self, params: dict[str, Tensor], run: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states after this layer."""
        return self.run(dict(self.named_parameters(recurse=False)), x)


class Decoder(nn.Module):
    """Embedding, layers, head: a module of each, so that each can be sharded."""

    def __init__(self, embed: nn.Module, layers: list[Any], head: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers, self.head = embed, nn.ModuleList(layers), head

    def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
        """Return the summed loss of a batch."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, *rest)
        out: Tensor = self.head(x)
        return out


def same(job: Job, batch: fstep.Packed) -> Decoder:
    """Build the module that calls the functions of fstep's model."""
    model, params = job.model, job.params()
    c, mesh = job.config, fstep.Mesh()
    cos, sin = tables(c.rope, batch, job.low)
    rest = (cos, sin, batch.cu_seqlens_padded, batch.max_seqlen)

    def layer(i: int) -> Callable[..., Tensor]:
        return lambda p, x: model._block(p, x, *rest, c.windows[i], model, mesh)

    def head(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        return -model.logprob_sum({"norm": norm, "head": weight}, x, batch)

    layers = [Block(params["layers"][i], layer(i)) for i in range(c.layers)]
    return Decoder(Embed(params["embed"]), layers, Head(params["norm"], params["head"], head))


def by_hand(job: Job, batch: fstep.Packed) -> Decoder:
    """Build the module of by_hand.py."""
    c, params = job.config, job.params()
    layers = [Layer(c, params["layers"][i], dense(batch.max_seqlen)) for i in range(c.layers)]
    run = job.compiled(head_loss)

    def head(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        return run(x, norm, weight, batch.labels, c.eps)

    return Decoder(
        Embed(params["embed"]), [job.compiled(layer) for layer in layers], Head(params["norm"], params["head"], head)
    )


def fsdp2(
    job: Job, batch: fstep.Packed, build: Callable[[Job, fstep.Packed], Decoder], reduce: torch.dtype
) -> tuple[Step, Any]:
    """Return the step of a decoder sharded over all ranks."""
    c = job.config
    angles = batch.positions[:, None] * c.rope.frequencies().to(job.device)
    rest = () if build is same else tuple(f(angles).to(job.low)[:, None] for f in (torch.cos, torch.sin))
    module = build(job, batch)
    options = _options(job, reduce)
    for part in (module.embed, *module.layers):
        fully_shard(part, **options)
    fully_shard(module.head, **options, reshard_after_forward=False)
    fully_shard(module, **options)
    return _step(job, module, lambda: module(batch.tokens, *rest), batch)


def titan(job: Job, batch: fstep.Packed, reduce: torch.dtype) -> tuple[Step, Any]:
    """Return torchtitan's step over all ranks."""
    module, _ = titan_with_weights(job, batch.max_seqlen)
    loss_fn = titan_compiled(job, module)
    mesh = init_device_mesh(job.device, (torch.distributed.get_world_size(),))
    apply_fsdp = import_module("torchtitan.models.llama3.infra.parallelize").apply_fsdp
    apply_fsdp(module, mesh, job.low, reduce, pp_enabled=False)
    tokens, labels = rows_of(batch)

    def forward() -> Tensor:
        out: Tensor = loss_fn(module(tokens), labels)
        return out

    return _step(job, module, forward, batch, summed=True)


def _options(job: Job, reduce: torch.dtype) -> dict[str, Any]:
    low = None if job.low == job.master else job.low
    return {
        "mesh": init_device_mesh(job.device, (torch.distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduce, cast_forward_inputs=False),
    }


def _step(
    job: Job, module: nn.Module, forward: Callable[[], Tensor], batch: fstep.Packed, summed: bool = False
) -> tuple[Step, Any]:
    """Return the step; gradients are averaged over the ranks, which have as many tokens each, or ``summed``."""
    opt = torch.optim.AdamW(
        module.parameters(), lr=job.lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=job.device == "cuda"
    )
    weight = batch.weights.sum() * (torch.distributed.get_world_size() if summed else 1)
    kept = Named()

    def step() -> tuple[Tensor, Tensor]:
        loss = forward() / weight
        loss.backward()  # type: ignore[no-untyped-call]
        norm: Any = nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        if job.keep:
            for name, p in module.named_parameters():
                grad: Any = p.grad
                kept[name.replace("_orig_mod.", "")] = grad.full_tensor().clone()
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach(), norm.full_tensor()

    return step, lambda: {PATHS.get(name, name): g for name, g in kept.items()}


PATHS = {"embed.weight": "embed", "head.norm": "norm", "head.weight": "head"}
