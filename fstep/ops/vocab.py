"""Log probabilities from a head cut by vocabulary: each rank computes its part of every token's logits.

    rank 0   logits of ids [0, V/2)     max, sum of exp, ...  ─┐  a few numbers a token are exchanged,
    rank 1   logits of ids [V/2, V)     max, sum of exp, ...  ─┴─ never logits: logp [T] on both

As in `fstep.ops.head`, which this is for a part of the head, a rank never holds more than a chunk of its logits.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from torch.nn import functional as F

from fstep.batch.packed import IGNORE
from fstep.mesh.axis import Axis
from fstep.mesh.collectives import psum
from fstep.ops import head
from fstep.ops.head_passes import Part
from fstep.ops.layers import check_ids
from fstep.ops.tensor import part_of, tp_gather
from fstep.tree import check_type


def tp_head_logits(
    hidden: Tensor, weight: Any, *, axis: Axis, tokens: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the logits of a few tokens, as in generation. Input: shards; output: replicated, [T, vocab].

    ``hidden`` [ceil(T / size), dim] is a shard of the tokens, of which there are ``tokens`` in all (without it the rows that
    stand for no token come along), ``weight`` a `Shard` along dim 0 of [vocab, dim]. The gradient of the result is
    replicated: all ranks go on to compute the same. On an axis of size 1 it is `head_logits`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `head_logits`.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     weight = fstep.Shard.cut(torch.tensor([[1.0], [2.0], [3.0]]), axis=mesh.tp, dim=0)
    ...     return fstep.tp_head_logits(torch.ones(1, 1), weight, axis=mesh.tp, tokens=1)
    >>> fstep.simulate(f, tp=2)
    [tensor([[1., 2., 3.]]), tensor([[1., 2., 3.]])]
    """
    rows, span, vocab = part_of("tp_head_logits", weight, axis, dim=0)
    if axis.size == 1:
        return head.head_logits(hidden, rows, temperature=temperature)
    start, stop = span
    part = head.head_logits(tp_gather(hidden, axis=axis, tokens=tokens), rows, temperature=temperature)
    out: Tensor = psum(F.pad(part, (start, vocab - stop)), axis=axis)
    return out


@overload
def tp_token_logprobs(
    hidden: Tensor, weight: Any, labels: Tensor, *, axis: Axis, temperature: float = ..., entropy: Literal[False] = ...
) -> Tensor: ...
@overload
def tp_token_logprobs(
    hidden: Tensor, weight: Any, labels: Tensor, *, axis: Axis, temperature: float = ..., entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def tp_token_logprobs(
    hidden: Tensor, weight: Any, labels: Tensor, *, axis: Axis, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log probability of each label, [T]. Input: shards, labels replicated; output: replicated.

    ``hidden`` [ceil(T / size), dim] is a shard of the tokens, ``weight`` a `Shard` along dim 0 of [vocab, dim], ``labels``
    [T] are those of all tokens. The math is that of `token_logprobs`, with sums over the vocabulary that run over the ranks;
    the largest logit of all ranks is taken off first. The parts of the vocabulary may be uneven. The gradient of the
    result is replicated: every rank computes the same loss from it. On an axis of size 1 it is `token_logprobs`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `token_logprobs`.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     weight = fstep.Shard.cut(torch.tensor([[0.0], [1.0]]), axis=mesh.tp, dim=0)
    ...     return fstep.tp_token_logprobs(torch.zeros(1, 1), weight, torch.tensor([1, -100]), axis=mesh.tp)
    >>> fstep.simulate(f, tp=2)
    [tensor([-0.6931,  0.0000]), tensor([-0.6931,  0.0000])]
    """
    rows, part = _part("tp_token_logprobs", hidden, weight, axis, temperature, labels=labels)
    if axis.size == 1:
        return head.token_logprobs(hidden, rows, labels, temperature=temperature, entropy=entropy)  # type: ignore[call-overload]
    return head.score(tp_gather(hidden, axis=axis, tokens=len(labels)), rows, labels, part, temperature, entropy)


def tp_token_logprob_sum(
    hidden: Tensor, weight: Any, labels: Tensor, weights: Tensor, *, axis: Axis, temperature: float = 1.0
) -> Tensor:
    """Return ``sum(weights * log probability)``, 0-d. Input: shards, labels and weights replicated; output: replicated.

    The shapes are those of `tp_token_logprobs`, ``weights`` is [T], and the way is that of `token_logprob_sum`: the gradient
    is taken in the forward pass. Ranks exchange a few numbers for every chunk of tokens. The gradient of the result is
    replicated: every rank computes the same loss from it. On an axis of size 1 it is `token_logprob_sum`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `token_logprob_sum`.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     weight = fstep.Shard.cut(torch.tensor([[0.0], [1.0]]), axis=mesh.tp, dim=0)
    ...     labels, weights = torch.tensor([1, -100]), torch.tensor([2.0, 1.0])
    ...     return fstep.tp_token_logprob_sum(torch.zeros(1, 1), weight, labels, weights, axis=mesh.tp)
    >>> fstep.simulate(f, tp=2)
    [tensor(-1.3863), tensor(-1.3863)]
    """
    rows, part = _part("tp_token_logprob_sum", hidden, weight, axis, temperature, labels=labels, weights=weights)
    if axis.size == 1:
        return head.token_logprob_sum(hidden, rows, labels, weights, temperature=temperature)
    return head.score_sum(tp_gather(hidden, axis=axis, tokens=len(labels)), rows, labels, weights, part, temperature)


def _part(
    function: str, hidden: Tensor, weight: Any, axis: Axis, temperature: float, **per_token: Tensor
) -> tuple[Tensor, Part]:
    """Check what a rank gives, and return its rows of the head and where they are."""
    for name, x in (("hidden", hidden), *per_token.items()):
        check_type(function, name, x, Tensor, "a tensor")
    rows, (start, _), vocab = part_of(function, weight, axis, dim=0)
    if axis.size > 1:
        head._check(function, hidden, rows, temperature)
        labels = per_token["labels"]
        for name, x in per_token.items():
            if hidden.dim() != 2 or x.dim() != 1 or len(x) != len(labels):
                raise ValueError(
                    f"{function}: hidden {tuple(hidden.shape)} and {name} {tuple(x.shape)} do not fit; they are a shard "
                    f"[tokens / {axis.size}, dim] and [tokens]"
                )
        check_ids(function, "label", labels, vocab, ignore=IGNORE)
    return rows, Part(start, vocab, axis)
