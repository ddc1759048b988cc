"""Between tokens and documents: a document's number at each of its tokens, and tokens that count by their document.

    tokens              a0   a1   a2  | b0   b1        weights             0    1    1  |  0    1
    documents           a             | b              document_weights    0   1/2  1/2 |  0    1
    spread_documents    a    a    a   | b    b
      last=True         0    0    a   | 0    b

They take `Docs` or a packed row. Nothing waits for the device: there are as many sums as documents, and tokens find theirs
by index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.batch.batch import Docs
from fstep.batch.packed import Packed
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import psum, pvary
from fstep.tree import check_type


def document_index(function: str, batch: Docs | Packed) -> tuple[Tensor, int]:
    """Return which document each token belongs to, and how many rows that numbers; padding goes with the one before."""
    check_type(function, "batch", batch, (Docs, Packed), "what make_docs or pack_thd returns")
    lengths = batch.lengths if isinstance(batch, Docs) else batch.cu_seqlens_padded.diff()
    rows = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(rows, lengths, output_size=len(batch.tokens)), len(lengths)


def check_whole(function: str, batch: Docs | Packed) -> None:
    """Refuse a shard."""
    check_type(function, "batch", batch, (Docs, Packed), "what make_docs or pack_thd returns")
    if isinstance(batch, Packed) and batch.parts > 1:
        raise ValueError(
            f"{function}: batch is one of {batch.parts} shards, in which no document is whole; do this before cp_shard, "
            "e.g. on what make_docs returns, and let the result travel in its targets"
        )


def check_tokens(function: str, name: str, x: Tensor, batch: Docs | Packed) -> None:
    """Refuse what is not one number a token."""
    check_type(function, name, x, Tensor, "a tensor with one number a token")
    if x.shape != batch.tokens.shape:
        raise ValueError(
            f"{function}: {name} has shape {tuple(x.shape)} for {len(batch.tokens)} tokens; give one number a token"
        )


def check_documents(function: str, name: str, x: Tensor, batch: Docs | Packed) -> None:
    """Refuse what is not one number a document."""
    check_type(function, name, x, Tensor, "a tensor with one number a document")
    if x.shape != batch.index.shape:
        raise ValueError(
            f"{function}: {name} has shape {tuple(x.shape)} for {len(batch.index)} documents; give one number a document"
        )


def document_sums(function: str, name: str, values: Tensor, batch: Docs | Packed, axis: Axis) -> Tensor:
    """Add up values over the tokens of each document that carry weight: [tokens] -> [documents], in float32 at least.

    Input: a shard over ``axis``, as ``batch`` is one; output: replicated, with a gradient that is a partial sum: each rank
    goes on to the losses of its own tokens.
    """
    index, rows = document_index(function, batch)
    check_tokens(function, name, values, batch)
    check_axis(function, axis)
    parts = batch.parts if isinstance(batch, Packed) else 1
    if parts != axis.size:
        has = "whole" if parts == 1 else f"one of {parts} shards"
        raise ValueError(
            f"{function}: batch is {has} and axis {axis.name!r} has {axis.size} ranks; pass a shard and its axis"
        )
    kept = torch.where(batch.weights != 0, values, 0).to(torch.promote_types(values.dtype, torch.float32))
    sums = kept.new_zeros(rows).index_add(0, index, kept)[: len(batch.index)]
    total: Tensor = pvary(psum(sums, axis=axis), axis=axis)
    return total


def spread_documents(values: Tensor, batch: Docs | Packed, *, last: bool = False) -> Tensor:
    """Give every token the number of its document: [documents] -> [tokens].

    With ``last`` only a document's last token that carries weight gets it, and the others 0: there a reward for the whole
    answer belongs. Works on a shard too (without ``last``, which a shard cannot know). No communication: on an axis where
    the tokens are shards, ``values`` are replicated, and their gradient is a partial sum.

    Raises ValueError for another length, or ``last`` on a shard.

    >>> import torch, fstep
    >>> docs = fstep.make_docs([[5, 6, 7], [8, 9]])
    >>> fstep.spread_documents(torch.tensor([0.5, -0.5]), docs)
    tensor([ 0.5000,  0.5000,  0.5000, -0.5000, -0.5000])
    >>> fstep.spread_documents(torch.tensor([1.0, 2.0]), docs, last=True)
    tensor([0., 0., 1., 0., 2.])
    """
    function = "spread_documents"
    index, rows = document_index(function, batch)
    check_documents(function, "values", values, batch)
    # A row without documents is all padding, which belongs to a document that is not there.
    values = torch.cat([values, values.new_zeros(rows - len(values))])
    if not last:
        return values[index]
    check_whole(function, batch)
    mask = batch.weights != 0
    final = mask & (next_counted(mask, index) == len(mask))
    return torch.where(final, values[index], 0)


def next_counted(mask: Tensor, index: Tensor) -> Tensor:
    """Return for each token the place of the next one of its document that counts, or the number of tokens."""
    tokens = len(mask)
    places = torch.arange(tokens, device=mask.device)
    # The nearest counted place from t on is a running minimum from the right.
    ahead = torch.where(mask, places, tokens).flip(0).cummin(0).values.flip(0)
    after = torch.cat([ahead, ahead.new_full((1,), tokens)])[1:]
    other = torch.cat([index, index.new_full((1,), -1)])[after] != index
    return after.masked_fill(other, tokens)


def document_weights(batch: Docs | Packed) -> Tensor:
    """Return ``weights / (sum of the document's weights)``: every document counts 1, whatever its length. [tokens]

    As weights they make a loss the mean over documents of each one's mean over tokens (GRPO, GSPO); as ``counts`` times L
    they divide a sum over tokens by L for each document (Dr. GRPO). A document that carries no weight counts 0. Take them
    before the batch is split: a shard does not know how long its documents are.

    Raises ValueError for a shard.

    >>> import fstep
    >>> fstep.document_weights(fstep.make_docs([[5, 6, 7], [8, 9], [4]]))
    tensor([0.0000, 0.5000, 0.5000, 0.0000, 1.0000, 0.0000])
    """
    check_whole("document_weights", batch)
    wide = batch.weights.to(torch.promote_types(batch.weights.dtype, torch.float32))
    total = spread_documents(document_sums("document_weights", "weights", wide, batch, Axis("cp")), batch)
    some = total != 0
    return torch.where(some, wide / torch.where(some, total, 1), 0)
