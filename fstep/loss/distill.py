"""Distillation: the student's distribution over the vocabulary is drawn to a teacher's, token by token.

    student   hidden [T, dim], weight [vocab, dim]     ─┐
                                                        ├─ sum(weight * divergence) over sum(weight)
    teacher   hidden, weight of its own params          │  a chunk of [tokens, vocab] at a time
              or k ids and log probabilities a token   ─┘

The teacher is a function of its own params, scored beside the student or before; no gradient reaches it. It may have other
dimensions and other depth, but needs the same vocabulary. The loss is a sum over tokens, so it is a partial sum over cp as
`sft_loss` is, and no split, packing or mesh changes it.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fstep.loss.divergence import How, divergence_sum
from fstep.mesh.axis import Axis
from fstep.ops.head import _check as check_head
from fstep.ops.head_passes import Part, widen
from fstep.ops.layers import check_ids
from fstep.ops.tensor import part_of, tp_gather
from fstep.ratio import Ratio
from fstep.tree import check_type

Divergence = Literal["forward", "reverse", "js"]


def distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Ratio:
    """Return ``sum(weight * D)`` over ``sum(weight)``, D how far the student's distribution is from the teacher's.

    ``hidden`` [tokens, dim] and ``weight`` [vocab, dim] are those of the student's head, ``teacher_hidden`` and
    ``teacher_weight`` [vocab, any dim] the teacher's, ``weights`` [tokens]. With s and t the softmax of each one's logits
    over ``temperature``, D is

    - ``"forward"``: KL(t | s) = sum(t (log t - log s)): the student covers all that the teacher does (arXiv 1503.02531).
    - ``"reverse"``: KL(s | t): it keeps to what the teacher finds likely (arXiv 2306.08543), best on its own samples.
    - ``"js"``: beta KL(t | m) + (1 - beta) KL(s | m) with m = beta t + (1 - beta) s, between the two (arXiv 2306.13649).

    D is not multiplied by ``temperature ** 2``, as is done where it is added to a loss at temperature 1. The whole
    [tokens, vocab] of either model is never there, and the gradient is taken in the forward pass, when the logits are: four
    products of tokens x vocab x dim in all, one of them the teacher's. Sums are float32 at least. A token of weight 0 is
    dropped, whatever its hidden states are. No gradient reaches the teacher. torch.func, torch.compile and gradients of
    gradients compute all tokens at once.

    The mean is 0 where both agree, and falls; ``"js"`` is at most log 2 at beta 0.5. Raises ValueError for shapes or dtypes
    that do not fit, an unknown divergence, a beta outside 0 to 1 and a temperature that is not positive.

    >>> import torch, fstep
    >>> student, teacher = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [1.0]])  # 1/2, 1/2 and 1/4, 3/4
    >>> hidden, third = torch.ones(2, 1), torch.tensor([1.0, 0.0])
    >>> fstep.distill_loss(hidden, student, hidden * torch.tensor(3.0).log(), teacher, third).mean()
    tensor(0.1308)
    """
    how = _how("distill_loss", weight, Part.all_of(weight), divergence, beta, temperature, False)
    _check("distill_loss", hidden, weight, weights, len(hidden), temperature)
    _check_teacher("distill_loss", teacher_hidden, teacher_weight, weight, len(hidden), temperature)
    return _ratio(hidden, weight, teacher_hidden, teacher_weight, weights, how)


def topk_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Ratio:
    """Return the same of a teacher of whom only the likeliest ids are known: ``ids`` and ``teacher_logprobs`` [tokens, k].

    The log probabilities are the teacher's over its whole vocabulary, at the same ``temperature``; ids of a token differ.
    Everything else is one more outcome, whose probability is what the k leave to 1, for the teacher and for the student:
    the divergence of k + 1 outcomes. So the student is held to the teacher's rest as well, D is never more than that of the
    full vocabulary (for the two KLs), and with k = vocab it is the same. Renormalising the k instead would let a student
    put any probability elsewhere. What the teacher leaves is taken to be one part in 2^23 at least (2^52 in float64).

    Three products in all. The rest, and what it raises, is as for `distill_loss`; also ValueError, on the CPU, for an id
    past the vocabulary at a token that counts.

    >>> import torch, fstep
    >>> student = torch.tensor([[0.0], [0.0], [0.0], [0.0]])  # 1/4 each; the teacher says 1/2 for id 2, and 1/2 elsewhere
    >>> ids, logprobs = torch.tensor([[2]]), torch.tensor([[0.5]]).log()
    >>> fstep.topk_distill_loss(torch.ones(1, 1), student, ids, logprobs, torch.ones(1)).mean()
    tensor(0.1438)
    """
    how = _how("topk_distill_loss", weight, Part.all_of(weight), divergence, beta, temperature, True)
    _check("topk_distill_loss", hidden, weight, weights, len(hidden), temperature)
    _check_top("topk_distill_loss", ids, teacher_logprobs, weights, len(weight))
    return _ratio(hidden, weight, ids, teacher_logprobs, weights, how)


def tp_distill_loss(
    hidden: Tensor,
    weight: Any,
    teacher_hidden: Tensor,
    teacher_weight: Any,
    weights: Tensor,
    *,
    axis: Axis,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Ratio:
    """Return `distill_loss` of heads cut by vocabulary. Inputs: shards, weights replicated; output: replicated.

    ``hidden`` and ``teacher_hidden`` [ceil(T / size), ...] are shards of the tokens, ``weight`` and ``teacher_weight``
    each a `Shard` along dim 0 over ``axis``, both cut alike; ``weights`` [T] are those of all tokens. Ranks exchange a few
    numbers for every chunk of tokens. The gradient of the result is replicated. On an axis of size 1 it is `distill_loss`.

    Raises ValueError for a weight that is not cut over ``axis``, and as `distill_loss`.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     student, teacher = (fstep.Shard.cut(torch.tensor(w), axis=mesh.tp, dim=0) for w in ([[0.0], [0]], [[0.0], [1]]))
    ...     hidden = torch.tensor([[3.0]]).log()
    ...     return fstep.tp_distill_loss(hidden, student, hidden, teacher, torch.ones(1), axis=mesh.tp).mean()
    >>> fstep.simulate(f, tp=2)
    [tensor(0.1308), tensor(0.1308)]
    """
    name = "tp_distill_loss"
    rows, span, vocab = part_of(name, weight, axis, dim=0)
    teacher_rows, teacher_span, _ = part_of(name, teacher_weight, axis, dim=0)
    how = _how(name, rows, Part(span[0], vocab, axis), divergence, beta, temperature, False)
    _check(name, hidden, rows, weights, len(hidden) if axis.size == 1 else None, temperature)
    if teacher_span != span:
        raise ValueError(f"{name}: this rank has ids {span} of weight and {teacher_span} of teacher_weight; cut both alike")
    _check_teacher(name, teacher_hidden, teacher_rows, rows, len(hidden), temperature)
    hidden, teacher_hidden = (tp_gather(x, axis=axis, tokens=len(weights)) for x in (hidden, teacher_hidden))
    return _ratio(hidden, rows, teacher_hidden, teacher_rows, weights, how)


def tp_topk_distill_loss(
    hidden: Tensor,
    weight: Any,
    ids: Tensor,
    teacher_logprobs: Tensor,
    weights: Tensor,
    *,
    axis: Axis,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Ratio:
    """Return `topk_distill_loss` of a head cut by vocabulary. Inputs: hidden and weight shards, the rest replicated.

    ``hidden`` [ceil(T / size), dim] is a shard of the tokens, ``weight`` a `Shard` along dim 0 over ``axis``; ``ids``,
    ``teacher_logprobs`` [T, k] and ``weights`` [T] are those of all tokens. Output: replicated, and so is its gradient. On
    an axis of size 1 it is `topk_distill_loss`. Raises ValueError as that, and for a weight that is not cut over ``axis``.

    >>> import torch, fstep
    >>> def f(mesh):
    ...     student = fstep.Shard.cut(torch.zeros(4, 1), axis=mesh.tp, dim=0)
    ...     top = torch.tensor([[2]]), torch.tensor([[0.5]]).log()
    ...     return fstep.tp_topk_distill_loss(torch.ones(1, 1), student, *top, torch.ones(1), axis=mesh.tp).mean()
    >>> fstep.simulate(f, tp=2)
    [tensor(0.1438), tensor(0.1438)]
    """
    name = "tp_topk_distill_loss"
    rows, span, vocab = part_of(name, weight, axis, dim=0)
    how = _how(name, rows, Part(span[0], vocab, axis), divergence, beta, temperature, True)
    _check(name, hidden, rows, weights, len(hidden) if axis.size == 1 else None, temperature)
    _check_top(name, ids, teacher_logprobs, weights, vocab)
    hidden = tp_gather(hidden, axis=axis, tokens=len(weights))
    return _ratio(hidden, rows, ids, teacher_logprobs, weights, how)


def _ratio(hidden: Tensor, weight: Tensor, one: Tensor, two: Tensor, weights: Tensor, how: How) -> Ratio:
    weights = weights.to(widen(hidden))
    return Ratio(divergence_sum(hidden, weight, one, two, weights, how), weights.sum())


def _how(function: str, weight: Any, part: Part, kind: str, beta: float, temperature: float, top: bool) -> How:
    if kind not in ("forward", "reverse", "js"):
        raise ValueError(f'{function}: divergence is {kind!r}; pass "forward", "reverse" or "js"')
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f'{function}: beta is {beta}; pass a number between 0 and 1, or divergence="forward" or "reverse"')
    return How(part, kind, beta, temperature, top)


def _check(function: str, hidden: Tensor, weight: Tensor, weights: Tensor, tokens: int | None, temperature: float) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("weights", weights)):
        check_type(function, name, x, Tensor, "a tensor")
    check_head(function, hidden, weight, temperature)
    if hidden.dim() != 2 or weights.dim() != 1 or (tokens is not None and len(weights) != tokens):
        raise ValueError(
            f"{function}: hidden {tuple(hidden.shape)} and weights {tuple(weights.shape)} do not fit; they are [tokens, "
            "dim] and [tokens]"
        )


def _check_teacher(function: str, hidden: Tensor, weight: Tensor, student: Tensor, tokens: int, temperature: float) -> None:
    for name, x in (("teacher_hidden", hidden), ("teacher_weight", weight)):
        check_type(function, name, x, Tensor, "a tensor")
    check_head(f"{function}, the teacher", hidden, weight, temperature)
    if hidden.dim() != 2 or len(hidden) != tokens or len(weight) != len(student):
        raise ValueError(
            f"{function}: teacher_hidden {tuple(hidden.shape)} and teacher_weight {tuple(weight.shape)} are to be those of "
            f"the student's {tokens} tokens and {len(student)} ids"
        )


def _check_top(function: str, ids: Tensor, logprobs: Tensor, weights: Tensor, vocab: int) -> None:
    for name, x in (("ids", ids), ("teacher_logprobs", logprobs)):
        check_type(function, name, x, Tensor, "a tensor [tokens, k]")
    if ids.dim() != 2 or len(ids) != len(weights) or logprobs.shape != ids.shape:
        raise ValueError(
            f"{function}: ids {tuple(ids.shape)} and teacher_logprobs {tuple(logprobs.shape)} are to be [tokens, k], for "
            f"{len(weights)} tokens"
        )
    check_ids(function, "id", ids.masked_fill((weights == 0)[:, None], 0), vocab)
