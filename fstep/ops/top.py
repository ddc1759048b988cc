"""The likeliest tokens at each place, as a teacher's answers or a sampler's check need them; [tokens, vocab] is never there.

rank 0   its part's k largest ─┐
rank 1   its part's k largest ─┴─ 2k candidates a token are exchanged ── the k largest of all, less the logsumexp
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fstep.mesh.axis import Axis
from fstep.mesh.collectives import all_gather
from fstep.ops import head_passes as passes
from fstep.ops.head import _check, _step
from fstep.ops.head_passes import Part, chunks, widen
from fstep.ops.tensor import part_of, tp_gather
from fstep.tree import check_type


def token_top_logprobs(hidden: Tensor, weight: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the k largest log probabilities at each place and their ids, [tokens, k] both, the largest first.

    ``hidden`` is [tokens, dim], ``weight`` [vocab, dim]; the math is that of `token_logprobs`, in float32 at least. There is
    no gradient: it is for what is looked at, or taught by.

    Raises ValueError for shapes, dtypes or a temperature that do not fit, and a ``k`` that is not from 1 to vocab.

    >>> import torch, fstep
    >>> fstep.token_top_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [2.0], [1.0]]), 2)
    (tensor([[-0.4076, -1.4076]]), tensor([[1, 2]]))
    """
    for name, x in (("hidden", hidden), ("weight", weight)):
        check_type("token_top_logprobs", name, x, Tensor, "a tensor")
    return _top("token_top_logprobs", hidden, weight, k, Part.all_of(weight), temperature)


def tp_token_top_logprobs(
    hidden: Tensor, weight: Any, k: int, *, axis: Axis, tokens: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the same from a head cut by vocabulary. Input: shards; output: replicated, [T, k] both.

    ``hidden`` [ceil(T / size), dim] is a shard of the tokens, of which there are ``tokens`` in all (without it the rows that
    stand for no token come along), ``weight`` a `Shard` along dim 0 of [vocab, dim]. On an axis of size 1 it is
    `token_top_logprobs`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `token_top_logprobs`.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     weight = fstep.Shard.cut(torch.tensor([[0.0], [2.0], [1.0]]), axis=mesh.tp, dim=0)
    ...     return fstep.tp_token_top_logprobs(torch.ones(1, 1), weight, 2, axis=mesh.tp, tokens=1)[1]
    >>> fstep.simulate(f, tp=2)
    [tensor([[1, 2]]), tensor([[1, 2]])]
    """
    check_type("tp_token_top_logprobs", "hidden", hidden, Tensor, "a tensor")
    rows, (start, _), vocab = part_of("tp_token_top_logprobs", weight, axis, dim=0)
    if axis.size == 1:
        return token_top_logprobs(hidden, rows, k, temperature=temperature)
    hidden = tp_gather(hidden.detach(), axis=axis, tokens=tokens)
    return _top("tp_token_top_logprobs", hidden, rows, k, Part(start, vocab, axis), temperature)


@torch.no_grad()
def _top(function: str, hidden: Tensor, weight: Tensor, k: int, part: Part, temperature: float) -> tuple[Tensor, Tensor]:
    _check(function, hidden, weight, temperature)
    if hidden.dim() != 2:
        raise ValueError(f"{function}: hidden has shape {tuple(hidden.shape)}; pass [tokens, dim]")
    if not isinstance(k, int) or not 1 <= k <= part.vocab:
        raise ValueError(f"{function}: k is {k!r}; pass a number from 1 to {part.vocab}, the size of the vocabulary")
    rounded, some = weight.to(hidden.dtype), min(k, len(weight))
    values, ids, sums = [], [], []
    for at in chunks(0, len(hidden), _step(part, widen(hidden))):
        logits = passes.product(hidden[at], rounded) / temperature
        found = logits.topk(some)
        values.append(found.values)
        ids.append(found.indices + part.start)
        sums.append(logits.logsumexp(-1))
        del logits
    best, where, lse = torch.cat(values), torch.cat(ids), torch.cat(sums)
    if part.axis.size > 1:  # ranks may have fewer than k ids, and of different numbers
        best, where = F.pad(best, (0, k - some), value=-torch.inf), F.pad(where, (0, k - some))
        best, where = (all_gather(x, axis=part.axis, dim=1, grad="slice") for x in (best, where))
        lse = all_gather(lse[:, None], axis=part.axis, dim=1, grad="slice").logsumexp(-1)
        best, order = best.topk(k)
        where = where.gather(1, order)
    return best - lse[:, None], where
