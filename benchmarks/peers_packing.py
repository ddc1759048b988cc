"""Documents as transformers' models take them: padded batches, rows in the documents' order, and the rows of TRL's packing.

    padded      [4, longest]    attention_mask
    packed      [1, T]          position_ids that start again, cu_seq_lens; a document's first label is -100

The models shift labels themselves: a first token's label would be predicted from the document before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from job import Job, Named, Step, module_step
from peers_modules import hf_module
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

import fstep

Docs = Sequence[Tensor]
KERNEL = "varlen_of_benchmark"  # the name under which transformers finds `attend`
IGNORE = -100
TAKES_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.13 on


def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **kwargs: Any) -> Any:
    """Attend over the documents of a row [1, heads, T, head_dim]: varlen_attn, and on the CPU one after the other."""
    cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    if q.device.type == "cpu":
        parts = []
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            qd, kd, vd = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            y = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, enable_gqa=True, scale=scaling)
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)[None], None
    more: dict[str, Any] = {"enable_gqa": True} if TAKES_FLAG and q.shape[1] != k.shape[1] else {}
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), scale=scaling, **more)
    return out[None], None


def register() -> None:
    """Make the kernel known to transformers, with no mask made for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KERNEL, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(KERNEL, lambda *_, **__: None)


def padded(docs: Docs, at_once: int = 4) -> list[dict[str, Any]]:
    """Return batches of a few documents, each as long as its longest, rounded up to 8."""
    batches = []
    for i in range(0, len(docs), at_once):
        some = docs[i : i + at_once]
        shape = (len(some), -(-max(map(len, some)) // 8) * 8)
        ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE), torch.zeros(shape).long()
        for row, doc in enumerate(some):
            ids[row, : len(doc)] = labels[row, : len(doc)] = doc
            mask[row, : len(doc)] = 1
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def row_of(docs: Docs, length: int | None = None) -> dict[str, Any]:
    """Lay documents end to end; what is left of ``length`` is one more, which counts for nothing."""
    rest = 0 if length is None else length - sum(map(len, docs))
    parts = [*docs, torch.zeros(rest, dtype=torch.int64)] if rest else list(docs)
    sizes = torch.tensor([len(part) for part in parts])
    ids = torch.cat(parts)
    labels = ids.clone()
    labels[sizes.cumsum(0) - sizes] = IGNORE
    labels[len(ids) - rest :] = IGNORE
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        "cu_seq_lens_q": F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32),
        "max_length_q": int(sizes.max()),
    }


def in_order(docs: Docs, length: int) -> list[dict[str, Any]]:
    """Fill rows of one length; a document that does not fit opens the next one."""
    rows: list[list[Tensor]] = [[]]
    for doc in docs:
        if sum(map(len, rows[-1])) + len(doc) > length:
            rows.append([])
        rows[-1].append(doc)
    return [row_of(row, length) for row in rows]


def by_trl(docs: Docs, length: int) -> list[dict[str, Any]]:
    """Let TRL's ``pack_dataset`` say what goes together."""
    given = import_module("datasets").Dataset.from_dict({"input_ids": [doc.tolist() for doc in docs]})
    packed = import_module("trl.data_utils").pack_dataset(given, seq_length=length, strategy="bfd")
    return [row_of(torch.split(torch.tensor(row["input_ids"]), list(row["seq_lengths"]))) for row in packed]


def by_us(docs: Docs, length: int) -> list[dict[str, Any]]:
    """Take fstep's rows."""
    parts = fstep.split_microbatches(fstep.make_docs(docs), max_tokens=length)
    return [row_of(torch.split(part.tokens, part.lengths.tolist())) for part in parts]


def places(lay: Callable[[Docs], list[dict[str, Any]]], docs: Docs) -> int:
    """Count the places that are computed on."""
    return sum(batch["input_ids"].numel() for batch in lay(docs))


def transformers_step(
    job: Job, groups: Sequence[Docs], lay: Callable[[Docs], list[dict[str, Any]]], attention: str
) -> tuple[Step, Callable[[], Named]]:
    """Return the step that trains on the next group; the batches are made ahead, and only moved in the step."""
    module, names = hf_module(job, attention)
    if attention == KERNEL and job.backend == "inductor":
        for layer in module.model.layers:
            layer.compile()
    ahead = [lay(group) for group in groups]
    # Tensors, as its Trainer gives them: of a number every layer's compiled code would ask whether it has changed.
    weights = [torch.tensor(sum(len(doc) - 1 for doc in group), device=job.device) for group in groups]
    turn = iter(range(1 << 30))

    def backward() -> Tensor:
        number = next(turn) % len(ahead)
        total = torch.zeros((), device=job.device)
        for batch in ahead[number]:
            here = {k: x.to(job.device, non_blocking=True) if isinstance(x, Tensor) else x for k, x in batch.items()}
            with job.autocast():
                loss = module(**here, num_items_in_batch=weights[number]).loss
            loss.backward()
            total += loss.detach()
        return total

    return module_step(job, names, backward)
