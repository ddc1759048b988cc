"""`Packed`: documents laid end to end in one row (THD), with their boundaries as data.

two documents, a b c and d e, packed with multiple_of=4

tokens             a    b    c    0  |  d    e    0    0
labels             b    c  -100 -100 |  e  -100 -100 -100      the next token of the same document
weights            1    1    0    0  |  1    0    0    0      how much predicting the label counts
positions          0    1    2    0  |  0    1    0    0
cu_seqlens         0 3 5         where each document would start without padding
cu_seqlens_padded  0 4 8         where it starts in this row
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

from fstep.batch.batch import Docs, cut
from fstep.tree import check_type, pytree, static

IGNORE = -100  # the label of a place that predicts nothing, by the convention of torch's cross_entropy


B = TypeVar("B", Docs, "Packed")


@pytree
class Packed:
    """A row of T tokens holding D documents; what a model and a loss see. Made by `pack_thd`.

    ``tokens, labels, positions`` are int64 [T], ``weights`` floating [T], ``cu_seqlens, cu_seqlens_padded`` int32 [D+1].
    ``targets`` are aligned with ``labels`` (place t holds the value about predicting token t+1), ``inputs`` with
    ``tokens``. ``max_seqlen`` is the longest document with its padding. ``parts`` is 1, or over how many ranks `cp_shard`
    has spread the row.

    >>> import fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[5, 6, 7], [8, 9]]))
    >>> isinstance(packed, fstep.Packed), packed.positions, packed.max_seqlen
    (True, tensor([0, 1, 2, 0, 1]), 3)
    """

    max_seqlen: int = static()
    tokens: Tensor = cut("token")
    labels: Tensor = cut("token")
    weights: Tensor = cut("token")
    positions: Tensor = cut("token")
    targets: dict[str, Tensor] = cut("token")
    inputs: dict[str, Tensor] = cut("token")
    cu_seqlens: Tensor = cut("none")
    cu_seqlens_padded: Tensor = cut("none")
    index: Tensor = cut("document")
    per_document: dict[str, Tensor] = cut("document")
    shared: dict[str, Any] = cut("none")
    parts: int = static(default=1)


def with_targets(batch: B, /, **values: Tensor) -> B:
    """Return `Docs` or a `Packed` row with more ``targets``: numbers about predicting each token, or each label.

    What has one of these names is replaced. Raises TypeError for another batch or a value that is no tensor, ValueError for
    one that has not one entry a token.

    >>> import torch, fstep
    >>> docs = fstep.with_targets(fstep.make_docs([[5, 6], [7]]), advantage=torch.tensor([0.0, 2.0, 0.0]))
    >>> fstep.pack_thd(docs).targets  # beside the label it is about
    {'advantage': tensor([2., 0., 0.])}
    """
    check_type("with_targets", "batch", batch, (Docs, Packed), "what make_docs or pack_thd returns")
    for name, value in values.items():
        check_type("with_targets", name, value, Tensor, "a tensor with one entry a token")
        if value.shape[:1] != batch.tokens.shape:
            raise ValueError(
                f"with_targets: {name} has shape {tuple(value.shape)} and the batch {len(batch.tokens)} tokens; give one "
                "entry for each"
            )
    return dataclasses.replace(batch, targets={**batch.targets, **values})
