"""FSDP2 beside shard_params, torch.distributed.tensor.parallel beside a Dense on mesh.tp; the same weights and documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peers_model import LEARN, Block, Llama, Named, Row, compare, dense_row, fill, grads_of, loss_of, named, ragged_docs
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fstep
from fstep_models.dense import Config, Dense

LENGTHS = [17, 3, 9, 1, 22, 6, 12, 5, 8, 2, 14, 7]
ADAMW = fstep.AdamW(weight_decay=0.1)
CLIP = 0.5


def whole(tree: Any) -> Named:
    """Return every leaf of a sharded tree, whole."""
    return {name: x.clone() for name, x in named(fstep.unshard_params(tree)).items()}


def microbatches_of(step: int, config: Config, mesh: fstep.Mesh) -> tuple[fstep.Docs, ...]:
    """Return this rank's uneven documents of a step, in two microbatches."""
    docs = ragged_docs(LENGTHS[step:] + LENGTHS[:step], config.vocab, step=step)
    return fstep.split_microbatches(docs, num=2, axis=mesh.dp)


def zero_steps(config: Config, mesh: fstep.Mesh, device: str, *, layerwise: bool) -> list[tuple[Tensor, Named]]:
    """Take three steps; return the loss and gradients of each, and then the weights.

    ``layerwise``: every layer is gathered where it is used (ZeRO-3); otherwise all of them around the step.
    """
    model = Dense(config)
    params = fstep.shard_params(model.init(fstep.Key.seed(0), dtype=torch.float64, device=device), mesh.dp)
    state = fstep.init_state(params, ADAMW)

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    out: list[tuple[Tensor, Named]] = []
    for number in range(3):
        batch = [fstep.to_device(fstep.pack_thd(part), device) for part in microbatches_of(number, config, mesh)]
        used = state.params if layerwise else fstep.gather_params(state.params)
        loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, used, batch)
        grads = grads if layerwise else fstep.scatter_grads(grads, state.params)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=CLIP)
        out.append((metrics["loss"], whole(grads) | {"grad_norm": metrics["grad_norm"]}))
        state = ADAMW.update(state, grads, lr=LEARN)
    return [*out, (metrics["loss"], whole(state.params))]


def fsdp_steps(config: Config, mesh: fstep.Mesh, device: str) -> list[tuple[Tensor, Named]]:
    """Return the same of FSDP2, clip_grad_norm_ and torch.optim.AdamW."""
    module = fill(config, Dense(config).init(fstep.Key.seed(0), dtype=torch.float64, device=device))
    ranks = init_device_mesh(device, (mesh.size,))
    for layer in module.layers.values():
        fully_shard(layer, mesh=ranks)
    fully_shard(module, mesh=ranks)
    options: dict[str, Any] = {"betas": ADAMW.betas, "eps": ADAMW.eps, "weight_decay": ADAMW.weight_decay}
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARN, **options)
    out = []
    for number in range(3):
        batch = [dense_row(part, device) for part in microbatches_of(number, config, mesh)]
        weight: Any = torch.stack([row["weights"].sum() for row in batch]).sum()
        dist.all_reduce(weight)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for i, row in enumerate(batch):
            module.set_requires_gradient_sync(i == len(batch) - 1)  # type: ignore[operator]
            part = loss_of(module, row) / weight
            (part * mesh.size).backward()  # it averages over the ranks
            loss += part.detach()
        dist.all_reduce(loss)
        norm: Any = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        out.append((loss, {k: g.clone() for k, g in grads_of(module).items()} | {"grad_norm": norm.full_tensor()}))
        optimizer.step()
        optimizer.zero_grad()
    weights = {k.removesuffix(".weight"): p.full_tensor() for k, p in module.named_parameters()}  # type: ignore[attr-defined]
    return [*out, (loss, weights)]


def sharded(mesh: fstep.Mesh, config: Config, device: str) -> list[Row]:
    """Compare three steps of AdamW on uneven documents, two microbatches a rank."""
    theirs = fsdp_steps(config, mesh, device)
    rows = []
    for note, layerwise in (("gathered layer by layer", True), ("gathered once a step", False)):
        ours = zero_steps(config, mesh, device, layerwise=layerwise)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            what = f"step {number}, {note}" if number < 3 else f"weights after 3 steps of AdamW, {note}"
            rows.append(compare(f"sharded parameters, {mesh.size} ranks", "FSDP2", a, b, what))
    return rows


def parallelize(module: Llama, ranks: DeviceMesh) -> Llama:
    """Cut a module as torch's tutorial cuts a Llama: hidden states between blocks are shards of the tokens."""
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    block: dict[str, Any] = {name: SequenceParallel() for name in ("attn_norm", "mlp_norm")}
    block |= {name: ColwiseParallel(input_layouts=Shard(1)) for name in ("q", "k", "v", "gate", "up")}
    block |= {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("o", "down")}
    for layer in module.layers.values():
        assert isinstance(layer, Block)
        parallelize_module(layer, ranks, block)
    parallelize_module(module, ranks, plan)
    return module


def tensor(mesh: fstep.Mesh, config: Config, device: str) -> list[Row]:
    """Compare a row of uneven documents, filled up for the peer, which needs tokens that the ranks divide."""
    docs = ragged_docs(LENGTHS[:8], config.vocab)
    packed = fstep.to_device(fstep.pack_thd(docs), device)
    model = Dense(config)
    alone = model.init(fstep.Key.seed(0), dtype=torch.float64, device=device)
    params = model.part(alone, mesh=mesh)

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb, mesh=mesh), mb.weights)

    loss, grads = fstep.pp_forward_backward(model.stage(mesh), loss_fn, params, [packed])
    module = parallelize(fill(config, alone), init_device_mesh(device, (mesh.size,)))
    theirs = loss_of(module, dense_row(docs, device, multiple_of=mesh.tp.size))
    theirs.backward()  # type: ignore[no-untyped-call]
    full = grads_of(module)
    where = {place.path: place for place in fstep.places(grads)}
    cut = {path: place.cut(full[path]) for path, place in where.items()}
    sides = (loss.num, named(fstep.bare(grads))), (theirs.detach(), cut)  # type: ignore[union-attr]
    return [compare(f"tensor, {mesh.size} ranks", "tensor.parallel", *sides, "our Dense")]
