"""`pack_thd` lays documents end to end in one row; `unpack_thd` takes them out again.

Padding a batch to its longest document computes on zeros; packing computes on tokens. The arithmetic is the same as for
each document alone, because attention stops at document boundaries and positions restart there. See `Packed` for the
picture.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fstep.batch.batch import Docs, check_sizes, ragged_index
from fstep.batch.packed import IGNORE, Packed
from fstep.tree import check_type, tree_map


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def pack_thd(batch: Docs, *, multiple_of: int = 1, length: int | None = None) -> Packed:
    """Lay the documents of ``batch`` end to end, each padded to a multiple of ``multiple_of`` tokens.

    With ``length`` the row is padded to exactly that many tokens (the last document's padding grows), so that every row has
    one shape. Labels are the next token of the same document, ``-100`` where there is none; weights and ``targets`` move
    along with the labels. A batch without documents gives a row of padding with weight 0.

    Raises ValueError if the documents do not fit into ``length``, ``length`` is no multiple of ``multiple_of``, a document
    is empty or a field has the wrong length; TypeError for a batch with fields of its own, which a row has no place for.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[5, 6, 7], [8, 9]]), multiple_of=4)
    >>> packed.tokens, packed.labels
    (tensor([5, 6, 7, 0, 8, 9, 0, 0]), tensor([   6,    7, -100, -100,    9, -100, -100, -100]))
    >>> packed.cu_seqlens, packed.cu_seqlens_padded
    (tensor([0, 3, 5], dtype=torch.int32), tensor([0, 4, 8], dtype=torch.int32))
    """
    check_type("pack_thd", "batch", batch, Docs, "what make_docs returns")
    check_type("pack_thd", "multiple_of", multiple_of, int, "a whole number")
    check_type("pack_thd", "length", length, (int, type(None)), "a whole number, or None")
    if multiple_of < 1:
        raise ValueError(f"pack_thd: multiple_of is {multiple_of}; pass 1 or more")
    if length is not None and (length < 1 or length % multiple_of):
        raise ValueError(f"pack_thd: length {length} is no positive multiple of multiple_of={multiple_of}")
    held = {f.name for f in dataclasses.fields(Docs)}
    if more := [f.name for f in dataclasses.fields(batch) if f.name not in held]:
        raise TypeError(
            f"pack_thd: a row has no place for {', '.join(more)} of {type(batch).__name__}; pack a Docs without these fields"
        )
    check_sizes("pack_thd", batch)
    if batch.tokens.dtype not in (torch.int32, torch.int64):  # labels of others cannot say "none"
        raise TypeError(f"pack_thd: tokens are {batch.tokens.dtype}; pass int64 ids, as make_docs makes them")
    device, documents = batch.tokens.device, len(batch.lengths)
    lengths = batch.lengths if documents else torch.zeros(1, dtype=torch.int64, device=device)
    if documents and int(lengths.min()) < 1:
        raise ValueError(f"pack_thd: document {int(lengths.argmin())} has {int(lengths.min())} tokens; leave empty ones out")
    padded = (lengths + multiple_of - 1) // multiple_of * multiple_of
    total = max(int(padded.sum()), multiple_of) if length is None else length
    spare = total - int(padded.sum())
    if spare < 0:
        raise ValueError(
            f"pack_thd: {documents} documents need {total - spare} tokens (each padded to a multiple of {multiple_of}) and "
            f"length is {length}; pack fewer, e.g. with split_microbatches(max_tokens={length})"
        )
    padded = torch.cat([padded[:-1], padded[-1:] + spare])

    starts, starts_padded = _starts(lengths), _starts(padded)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), padded, output_size=total)
    offset = torch.arange(total, device=device) - starts_padded[document]
    left = lengths[document] - offset  # real tokens from here to the end of the document
    source = starts[document] + torch.where(left > 0, offset, 0)
    # A document's last place predicts nothing. It keeps what was given for the first token, so that nothing is lost.
    source_next = starts[document] + torch.where(left > 1, offset + 1, 0)

    def lay(x: Tensor, at: Tensor, keep: Tensor, fill: float = 0) -> Tensor:
        if not documents:
            return x.new_full((total, *x.shape[1:]), fill)
        keep = keep.reshape(-1, *[1] * (x.dim() - 1))
        return x[at].masked_fill(~keep, fill)  # torch.where would turn bool into int64

    return Packed(
        tokens=lay(batch.tokens, source, left > 0),
        labels=lay(batch.tokens, source_next, left > 1, IGNORE),
        weights=lay(batch.weights, source_next, left > 1),
        positions=torch.where(left > 0, offset, 0),
        targets=tree_map(lambda x: lay(x, source_next, left > 0), batch.targets),
        inputs=tree_map(lambda x: lay(x, source, left > 0), batch.inputs),
        cu_seqlens=starts.to(torch.int32),
        cu_seqlens_padded=starts_padded.to(torch.int32),
        index=batch.index,
        per_document=batch.per_document,
        shared=batch.shared,
        max_seqlen=int(padded.max()),
    )


def _real(function: str, packed: Packed) -> tuple[Tensor, Tensor]:
    """Return the documents' lengths and the places of their tokens in the row."""
    if packed.parts > 1:
        raise ValueError(
            f"{function}: packed is one of {packed.parts} shards, in which no document is whole; pass the row that "
            "cp_shard was given, and what cp_unshard gathers"
        )
    lengths = packed.cu_seqlens.diff().to(torch.int64)
    at = packed.cu_seqlens_padded[:-1].to(torch.int64)
    within = ragged_index(lengths, torch.arange(len(lengths), device=lengths.device))
    starts = lengths.cumsum(0) - lengths
    return lengths, within + torch.repeat_interleave(at - starts, lengths)


def unpack_thd(packed: Packed) -> Docs:
    """Take the documents out of a row: the inverse of `pack_thd`, whatever the padding was.

    >>> import fstep
    >>> docs = fstep.make_docs([[5, 6, 7], [8, 9]])
    >>> fstep.unpack_thd(fstep.pack_thd(docs, multiple_of=4)).tokens
    tensor([5, 6, 7, 8, 9])
    """
    check_type("unpack_thd", "packed", packed, Packed, "what pack_thd returns")
    lengths, places = _real("unpack_thd", packed)
    lengths = lengths[: len(packed.index)]
    starts = lengths.cumsum(0) - lengths
    # What is about token t stands at place t-1; the first token's stands at the document's last place.
    back = torch.arange(len(places), device=places.device) - 1
    back = places[back.index_copy(0, starts, starts + lengths - 1)]
    return Docs(
        tokens=packed.tokens[places],
        weights=packed.weights[back],
        lengths=lengths,
        index=packed.index,
        targets=tree_map(lambda x: x[back], packed.targets),
        inputs=tree_map(lambda x: x[places], packed.inputs),
        per_document=packed.per_document,
        shared=packed.shared,
    )


def split_documents(values: Any, packed: Packed) -> tuple[Any, ...]:
    """Split values with one entry a place ([T, ...]) into one part for each document, without the padding.

    Entry t of a part is what was computed at token t: for log probabilities, that of token t+1.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[5, 6, 7], [8, 9]]), multiple_of=4)
    >>> fstep.split_documents(packed.positions, packed)
    (tensor([0, 1, 2]), tensor([0, 1]))
    """
    check_type("split_documents", "packed", packed, Packed, "what pack_thd returns")
    check_type("split_documents", "values", values, Tensor, "a tensor with one entry a place")
    lengths, places = _real("split_documents", packed)
    if len(values) != len(packed.tokens):
        raise ValueError(
            f"split_documents: values has {len(values)} entries for {len(packed.tokens)} places; give one a place"
        )
    return tuple(values[places].split(lengths[: len(packed.index)].tolist()))
