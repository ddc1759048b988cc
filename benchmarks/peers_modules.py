"""Others' modules doing a `Job` on one GPU: torchtitan's Llama 3 and Qwen3, and those of transformers, with Liger's kernels.

torchtitan      its model, its checkpointing, its compilation of each block, its compiled loss, in a loop that does what its
                trainer does on one GPU: autocast over float32 parameters, clip_grad_norm_ with foreach, fused AdamW
transformers    its model under autocast, as its Trainer trains with bf16=True; Liger's kernels for norms, rotations, MLP and
                head + loss, applied as Liger's page says
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from job import Job, Names, Step, module_step
from torch import Tensor, nn

import fstep
from fstep.tree import tree_leaves, tree_paths

TITAN = {
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "q_norm": "attention.q_norm", "k_norm": "attention.k_norm", "attn_norm": "attention_norm", "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    "embed": "tok_embeddings", "norm": "norm", "head": "output",
}  # fmt: skip


def rows_of(batch: fstep.Packed) -> tuple[Tensor, Tensor]:
    """Return tokens and labels as rows of one document each; documents are of one length."""
    return batch.tokens.view(-1, batch.max_seqlen), batch.labels.view(-1, batch.max_seqlen)


def interleave(w: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a projection from pairs (d, d + D/2) to pairs (2d, 2d + 1), as Llama's own code has them."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).flatten(0, 2)


def deinterleave(w: Tensor, heads: int) -> Tensor:
    """Undo `interleave`."""
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).flatten(0, 2)


def titan_module(job: Job, doc: int) -> nn.Module:
    """Build torchtitan's module of this shape."""
    c = job.config
    common: dict[str, Any] = {
        "dim": c.dim, "n_layers": c.layers, "n_heads": c.heads, "n_kv_heads": c.kv_heads, "vocab_size": c.vocab,
        "norm_eps": c.eps, "rope_theta": c.rope.theta, "max_seq_len": doc,
    }  # fmt: skip
    if c.family == "qwen3":
        args = import_module("torchtitan.models.qwen3.model.args")
        common |= {"head_dim": c.head_dim, "hidden_dim": c.ffn, "qk_norm": c.qk_norm, "enable_weight_tying": c.tied}
        return import_module("torchtitan.models.qwen3.model.model").Qwen3Model(args.Qwen3ModelArgs(**common))
    args = import_module("torchtitan.models.llama3.model.args")
    # A scaling by 1 is none; the hidden size is rounded up from 8/3 of dim.
    common |= {"multiple_of": c.ffn, "rope_scaling_args": args.RoPEScalingArgs(scaling_factor=1.0)}
    return import_module("torchtitan.models.llama3.model.model").Transformer(args.TransformerModelArgs(**common))


def titan_with_weights(job: Job, doc: int) -> tuple[Any, Names]:
    """Build torchtitan's module with the job's weights."""
    logging.getLogger().setLevel(logging.WARNING)
    config, params = job.config, job.params()
    with torch.device(job.device):
        module: Any = titan_module(job, doc)
    for p in module.parameters():  # not the module: its rotations are a complex buffer
        p.data = p.data.to(job.master)
    module.train()
    table: dict[str, nn.Parameter] = {}
    write, read = {}, {}
    for path in tree_paths(params):
        *layer, leaf = path.split(".")
        table[path] = module.get_parameter(".".join([*layer, TITAN[leaf], "weight"]))
        if config.family == "llama" and leaf in ("q", "k"):
            heads = config.heads if leaf == "q" else config.kv_heads
            write[path] = lambda w, n=heads: interleave(w, n)
            read[path] = lambda w, n=heads: deinterleave(w, n)
    names = Names(table, write, read)
    names.load(params)
    return module, names


def titan_compiled(job: Job, module: Any) -> Any:
    """Compile each block of torchtitan's module, and return its loss, compiled likewise."""
    cross_entropy_loss = import_module("torchtitan.components.loss").cross_entropy_loss
    options = import_module("torchtitan.config.job_config")
    if job.remat != "none":
        apply_ac = import_module("torchtitan.distributed.activation_checkpoint").apply_ac
        apply_ac(module, options.ActivationCheckpoint(mode="full"), model_compile_enabled=job.backend is not None)
        dynamo: Any = torch._C._dynamo.eval_frame
        dynamo._set_lru_cache(True)  # it turns this off, for all sides that are in this process
    if job.backend is None:
        return cross_entropy_loss
    parallelize = import_module("torchtitan.models.llama3.infra.parallelize")
    parallelize.apply_compile(module, options.Compile(enable=True, backend=job.backend))
    return torch.compile(cross_entropy_loss, backend=job.backend)


def titan(job: Job, batch: fstep.Packed) -> tuple[Step, Any]:
    """Return torchtitan's step."""
    module, names = titan_with_weights(job, batch.max_seqlen)
    loss_fn = titan_compiled(job, module)
    tokens, labels = rows_of(batch)
    weight = batch.weights.sum()

    def backward() -> Tensor:
        with job.autocast():
            logits = module(tokens)
            loss = loss_fn(logits, labels) / weight
        del logits
        loss.backward()
        return loss.detach()

    return module_step(job, names, backward)


def hf_module(job: Job, attention: str, *, liger: bool = False) -> tuple[Any, Names]:
    """Build transformers' module of this shape, with the job's weights; Liger's kernels replace its classes for good."""
    from transformers import AutoConfig, AutoModelForCausalLM

    params = job.params()
    spec = job.model.spec()
    hf_names = {p: leaf.name for p, leaf in zip(tree_paths(spec), tree_leaves(spec), strict=True)}
    if liger:
        getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{job.config.family}")()
    given = job.config.to_hf()
    config = AutoConfig.for_model(given.pop("model_type"), **given, use_cache=False)
    with torch.device(job.device):
        module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=job.master, attn_implementation=attention
        )
    module.train()
    if job.remat != "none":
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = Names({path: module.get_parameter(hf_names[path]) for path in tree_paths(params)})
    names.load(params)
    return module, names


def hf(job: Job, batch: fstep.Packed, *, liger: bool) -> tuple[Step, Any]:
    """Return the step of transformers' module, on a batch of documents of one length."""
    module, names = hf_module(job, "sdpa", liger=liger)
    tokens, _ = rows_of(batch)

    def backward() -> Tensor:
        with job.autocast():
            loss = module(input_ids=tokens, labels=tokens).loss  # it shifts the labels itself
        loss.backward()
        return loss.detach()

    return module_step(job, names, backward)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice out of the table."""
    before = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(before)
