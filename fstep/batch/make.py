"""`make_docs`: from token lists to a checked batch of documents, on the CPU where a mistake can be named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fstep.batch.batch import Docs


def _flat(what: str, values: Sequence[Any], lengths: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """Lay per-document values end to end, checked to be one a token."""
    if len(values) != len(lengths):
        raise ValueError(f"make_docs: {what} has {len(values)} documents, tokens has {len(lengths)}; give one for each")
    for i, (v, n) in enumerate(zip(values, lengths, strict=True)):
        if len(v) != n:
            raise ValueError(f"make_docs: {what} of document {i} has {len(v)} values for {n} tokens; give one a token")
    if not len(values):
        return torch.zeros(0, dtype=dtype)
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if device is not None:
        return torch.cat([torch.as_tensor(v, device=device) for v in values])
    try:
        return torch.tensor(list(itertools.chain.from_iterable(values)), dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"make_docs: {what} are no numbers that fit a tensor ({error}); pass one number a token") from error


def _where(lengths: Tensor, bad: Tensor) -> str:
    """Name the first token marked in ``bad``."""
    t = int(bad.nonzero()[0, 0])
    document = int(torch.searchsorted(lengths.cumsum(0), t, right=True))
    return f"document {document}, token {t - int(lengths[:document].sum())}"


def _one_dim(what: str, x: Tensor) -> None:
    if x.dim() != 1:
        raise ValueError(f"make_docs: {what} of a token have shape {tuple(x.shape[1:])}; pass one number a token")


def make_docs(
    tokens: Sequence[Sequence[int] | Tensor],
    *,
    weights: Sequence[Sequence[float] | Tensor] | None = None,
    targets: Mapping[str, Sequence[Sequence[float] | Tensor]] | None = None,
    inputs: Mapping[str, Sequence[Sequence[float] | Tensor]] | None = None,
    per_document: Mapping[str, Sequence[float] | Tensor] | None = None,
    shared: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Docs:
    """Make a batch of documents from one sequence of token ids for each.

    ``weights`` says how much predicting each token counts (default 1; 0 for a prompt); the first token of a document has
    nothing before it to be predicted from, so its weight becomes 0. ``targets`` and ``inputs`` are further values, one for
    each token, ``per_document`` one for each document, ``shared`` for the whole batch. With ``vocab_size`` ids are checked
    against it, here on the CPU where the mistake can be named.

    Raises TypeError for ids that are no integers, ValueError for an empty document, negative ids or ids past the vocabulary,
    weights that are not finite, and fields of the wrong length.

    >>> import fstep
    >>> docs = fstep.make_docs([[5, 6, 7], [8, 9]], weights=[[0, 0, 1], [0, 1]])
    >>> docs.tokens, docs.lengths
    (tensor([5, 6, 7, 8, 9]), tensor([3, 2]))
    """
    for i, t in enumerate(tokens):
        if isinstance(t, str) or not hasattr(t, "__len__") or (isinstance(t, Tensor) and not t.dim()):
            raise TypeError(
                f"make_docs: document {i} is {t!r}; pass a sequence of token ids for each, e.g. [[5, 6, 7], [8, 9]]"
            )
    lengths = [len(t) for t in tokens]
    if 0 in lengths:
        raise ValueError(f"make_docs: document {lengths.index(0)} is empty; leave it out")
    ids = _flat("tokens", tokens, lengths, None if lengths else torch.int64)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"make_docs: tokens are {ids.dtype}; pass integer token ids")
    _one_dim("tokens", ids)
    ids = ids.to(torch.int64)
    counts = torch.tensor(lengths, dtype=torch.int64, device=ids.device)
    past = ids >= (2**62 if vocab_size is None else vocab_size)
    for bad, why in ((ids < 0, "negative"), (past, f"past the vocabulary of {vocab_size}")):
        if bad.any():
            raise ValueError(
                f"make_docs: {_where(counts, bad)} is {int(ids[bad][0])}, {why}; check the tokenizer that made it"
            )

    if weights is None:
        w = torch.ones(len(ids), device=ids.device)
    else:
        w = _flat("weights", weights, lengths, None).to(ids.device)
        _one_dim("weights", w)
        w = w if w.is_floating_point() else w.to(torch.float32)
    if not (ok := w.isfinite()).all():
        raise ValueError(
            f"make_docs: the weight of {_where(counts, ~ok)} is {float(w[~ok][0])}; give a finite number, 0 to leave it out"
        )
    w = w.index_fill(0, counts.cumsum(0) - counts, 0)

    rows = {name: torch.as_tensor(v, device=ids.device) for name, v in (per_document or {}).items()}
    for name, v in rows.items():
        if v.dim() == 0 or len(v) != len(lengths):
            raise ValueError(
                f"make_docs: per_document[{name!r}] has shape {tuple(v.shape)} for {len(lengths)} documents; "
                "give one a document"
            )
    return Docs(
        tokens=ids,
        weights=w,
        lengths=counts,
        index=torch.arange(len(lengths), device=ids.device),
        targets={k: _flat(f"targets[{k!r}]", v, lengths, None).to(ids.device) for k, v in (targets or {}).items()},
        inputs={k: _flat(f"inputs[{k!r}]", v, lengths, None).to(ids.device) for k, v in (inputs or {}).items()},
        per_document=rows,
        shared=dict(shared or {}),
    )
