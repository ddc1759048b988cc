"""From one number a token to one a document, wherever the document's tokens are.

    row         a  a  a  a  b  b  b          logp * weight, added up within each document
                 \\__+__/     \\_+_/
    documents       a          b             Ratio of [documents]: the sums, and the sums of the weights

    over cp     rank 0: a a . . b . .   ─┐   each rank adds up its own tokens of every document,
                rank 1: . . a a . b b   ─┴─  and one psum of 2 numbers a document makes the sums whole on both

What a loss makes of such sums (a margin, its sigmoid) is no sum over tokens, so every rank of cp computes all of it, alike;
`as_partial` then says so to `finalize_grads`, which adds up over cp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.batch.packed import Packed
from fstep.loss.documents import check_tokens, document_index
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import psum
from fstep.ops import zigzag
from fstep.ratio import Ratio
from fstep.tree import check_type


def cp_sequence_sums(values: Tensor, packed: Packed, *, axis: Axis) -> Ratio:
    """Return for each document ``sum(weight * value)`` and ``sum(weight)``. Input: a shard; output: replicated.

    ``values`` is [T], aligned with ``packed.labels``: log probabilities, or differences of two. The result is a `Ratio` of
    two [documents] tensors, float32 at least, in the order of ``packed.index``: ``num`` is the log probability of each
    answer, ``mean()`` that of an average token. A token of weight 0 is dropped, whatever value it has, and a document
    without weight has 0 of 0.

    Over ``axis`` each rank adds up its tokens of every document, and a `psum` of two numbers a document makes the sums
    whole. The gradient of the result is replicated: every rank computes the same loss from it. Return that loss through
    ``as_partial(loss, axis=mesh.cp)``, or `finalize_grads` counts it once a rank. On an axis of size 1 nothing is
    communicated.

    Raises ValueError if ``values`` is not [T], or ``packed`` no shard over this axis.

    >>> import torch, fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[5, 6, 7], [8, 9]]))
    >>> fstep.cp_sequence_sums(torch.tensor([-1.0, -2.0, -torch.inf, -4.0, 0.0]), packed, axis=fstep.Mesh().cp)
    Ratio(num=tensor([-3., -4.]), den=tensor([2., 1.]))
    """
    document, _ = _places("cp_sequence_sums", values, packed, axis)
    wide = torch.promote_types(torch.promote_types(values.dtype, packed.weights.dtype), torch.float32)
    weights = packed.weights.to(wide)
    terms = torch.where(weights != 0, values, 0) * weights
    num, den = _add_up(torch.stack([terms, weights]), document, packed, axis)
    return Ratio(num, den)


def cp_sequence_last(values: Tensor, packed: Packed, *, axis: Axis) -> Tensor:
    """Return the value at each document's last token, [documents]. Input: a shard; output: replicated.

    ``values`` is [T], one number at each token of ``packed``: what a reward head makes of hidden states, say. Values at
    other places and at padding are dropped, whatever they are. Over ``axis`` the rank that has a document's last token
    gives it to all; gradients are as for `cp_sequence_sums`.

    Raises ValueError as `cp_sequence_sums`.

    >>> import torch, fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[5, 6, 7], [8, 9]]), multiple_of=4)
    >>> fstep.cp_sequence_last(torch.arange(8.0), packed, axis=fstep.Mesh().cp)
    tensor([2., 5.])
    """
    document, within = _places("cp_sequence_last", values, packed, axis)
    last = within == packed.cu_seqlens.diff()[document] - 1
    return _add_up(torch.where(last, values, 0)[None], document, packed, axis)[0]


def _places(function: str, values: Tensor, packed: Packed, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return each place's document, and which place of the whole document it is."""
    check_type(function, "packed", packed, Packed, "what pack_thd or cp_shard returns")
    check_tokens(function, "values", values, packed)
    check_axis(function, axis)
    if packed.parts != axis.size:
        has = "a whole row" if packed.parts == 1 else f"one of {packed.parts} shards"
        raise ValueError(
            f"{function}: packed is {has}, and axis {axis.name!r} has {axis.size} ranks; pass what cp_shard(axis=) returned"
        )
    document, _ = document_index(function, packed)
    tokens, cu = len(packed.tokens), packed.cu_seqlens_padded
    if axis.size == 1:
        return document, torch.arange(tokens, device=cu.device) - cu[document]
    return document, zigzag.places(cu, tokens, axis.rank, axis.size) - axis.size * cu[document]


def _add_up(rows: Tensor, document: Tensor, packed: Packed, axis: Axis) -> Tensor:
    sums = rows.new_zeros(len(rows), len(packed.cu_seqlens) - 1).index_add(1, document, rows)
    # A row of padding alone has boundaries of one document, and none.
    out: Tensor = psum(sums[:, : len(packed.index)], axis=axis)
    return out
