"""Log probabilities from a head cut by vocabulary: each rank computes its part of every token's logits.

    rank 0   logits of ids [0, V/2)     max, sum of exp, ...  ─┐  a few numbers a token are exchanged,
    rank 1   logits of ids [V/2, V)     max, sum of exp, ...  ─┴─ never logits: logp [T] on both

As in `fstep.ops.head` a chunk of tokens at a time, and each chunk's logits again in the backward pass; so a rank never
holds more than a chunk of tokens times its part of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fstep.batch.packed import IGNORE
from fstep.mesh.axis import Axis
from fstep.mesh.collectives import pmax, psum
from fstep.mesh.place import Range
from fstep.ops import head
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


def _label(values: Tensor, labels: Tensor, span: Range) -> Tensor:
    """Return each token's value at its label, 0 on a rank that has not got that one."""
    here = (labels >= span[0]) & (labels < span[1])
    return torch.where(here, values.gather(-1, torch.where(here, labels - span[0], 0)[:, None])[:, 0], 0)


def _logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, span: Range, axis: Axis, temperature: float, entropy: bool
) -> list[Tensor]:
    """Return log probability and, if asked for, entropy of some tokens, in plain operations."""
    logits = head._logits(hidden, weight, temperature)
    z = logits - pmax(logits.detach().max(-1).values, axis=axis)[:, None]
    e = z.exp()
    # Without the moment, of which a logit of -inf makes NaN, where nobody asks for it.
    rows = [e.sum(-1), _label(z, labels, span), *([(e * z).sum(-1)] if entropy else [])]
    total, label, *moment = psum(torch.stack(rows), axis=axis)
    found = [label - total.log(), *(total.log() - m / total for m in moment)]
    return [torch.where(labels != IGNORE, x, 0) for x in found]


class _ChunkedVocabLogprobs(Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, span: Range, axis: Axis, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        top = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        # Sums over this rank's ids of exp(z) and exp(z) z, and the label's z, where z is a logit less this rank's largest.
        mine = torch.zeros(3, len(hidden), dtype=wide, device=hidden.device)
        step = head._chunk(weight.shape[0], wide.itemsize)
        for start in range(0, len(hidden), step):
            at = slice(start, start + step)
            logits = head._logits(hidden[at], weight, temperature)
            top[at] = logits.max(-1).values
            # Where all ids of this rank are ruled out, by logits of -inf, there is nothing to take off.
            z = logits.sub_(top[at, None].masked_fill(top[at, None] == -torch.inf, 0))
            mine[2, at] = _label(z, labels[at], span)
            e = z.exp() if entropy else z.exp_()
            mine[0, at] = e.sum(-1)
            if entropy:
                mine[1, at] = e.mul_(z).sum(-1)
        # Exchanged after all chunks: each rank's sums are brought to the largest logit of all.
        largest = pmax(top, axis=axis)
        lower = top - largest
        here = (labels >= span[0]) & (labels < span[1])
        mine[1] += lower * mine[0]
        mine[:2] *= lower.exp()
        mine[2] += torch.where(here, lower, 0)
        total, moment, label = psum(mine, axis=axis)
        log_total, counted = total.log(), labels != IGNORE
        ent = torch.where(counted, log_total - moment / total, 0)
        return torch.where(counted, label - log_total, 0), ent, largest + log_total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, labels, ctx.span, ctx.axis, ctx.temperature, ctx.entropy = inputs
        ctx.save_for_backward(hidden, weight, labels, output[1], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropy_all, lse_all = ctx.saved_tensors
        want = ctx.needs_input_grad[:2]
        nothing = (None,) * 5
        if torch.is_grad_enabled():
            # Somebody differentiates this backward pass: as in fstep.ops.head, on views.
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
            outs = _logprobs(hidden, weight, labels, ctx.span, ctx.axis, ctx.temperature, ctx.entropy)
            wanted = [x for x, w in zip((hidden, weight), want, strict=True) if w]
            grads = iter(torch.autograd.grad(outs, wanted, (g_logp, g_entropy)[: len(outs)], create_graph=True))
            return next(grads) if want[0] else None, next(grads) if want[1] else None, *nothing

        wide = lse_all.dtype
        d_hidden = torch.empty_like(hidden) if want[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want[1] else None
        step = head._chunk(weight.shape[0], wide.itemsize)
        first, stop = ctx.span
        for start in range(0, len(hidden), step):
            at = slice(start, start + step)
            h, y = hidden[at], labels[at, None]
            counted, here = y != IGNORE, (y >= first) & (y < stop)
            g = torch.where(counted, g_logp[at, None], 0)
            logp_all = head._logits(h, weight, ctx.temperature).sub_(lse_all[at, None])
            if ctx.entropy:
                # d entropy / d logits = -p (log p + entropy); d logp / d logits = onehot - p
                ge = torch.where(counted, g_entropy[at, None], 0)
                d = -logp_all.exp() * (g + ge * (logp_all + entropy_all[at, None]))
            else:
                d = logp_all.exp_().mul_(-g)
            d.scatter_add_(-1, torch.where(here, y - first, 0), torch.where(here, g, 0))
            head._through_product(d, h, weight, ctx.temperature, None if d_hidden is None else d_hidden[at], d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *nothing


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
    for name, x in (("hidden", hidden), ("labels", labels)):
        check_type("tp_token_logprobs", name, x, Tensor, "a tensor")
    rows, span, vocab = part_of("tp_token_logprobs", weight, axis, dim=0)
    if axis.size == 1:
        return head.token_logprobs(hidden, rows, labels, temperature=temperature, entropy=entropy)  # type: ignore[call-overload]
    head._check("tp_token_logprobs", hidden, rows, temperature)
    if hidden.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"tp_token_logprobs: hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not fit; they are a shard "
            f"[tokens / {axis.size}, dim] and [tokens]"
        )
    check_ids("tp_token_logprobs", "label", labels, vocab, ignore=IGNORE)
    whole = tp_gather(hidden, axis=axis, tokens=len(labels))
    logp, ent, _ = _ChunkedVocabLogprobs.apply(whole, rows, labels, span, axis, temperature, entropy)  # type: ignore[no-untyped-call]
    return (logp, ent) if entropy else logp
