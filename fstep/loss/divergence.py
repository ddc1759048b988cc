"""How far two distributions over the vocabulary are apart, a chunk of tokens at a time, the gradient taken on the way.

    chunk of tokens      student logits [n, vocab] ─┬─ divergence of each token [n]
                         teacher logits [n, vocab] ─┘  d student logits [n, vocab] ──> d hidden, d weight
                         (or k ids and log probabilities [n, k])                       then both chunks are let go

With l = log softmax(logits), and a = the slope of the divergence with l as if its elements were free, the gradient of the
student's logits is ``a - softmax * sum(a)``:

    forward   KL(teacher | student)   sum(pt (lt - ls))                                 a = -pt
    reverse   KL(student | teacher)   sum(ps (ls - lt))                                 a = ps (ls - lt)
    js        beta KL(t | m) + (1 - beta) KL(s | m),  m = beta pt + (1 - beta) ps       a = (1 - beta) ps (ls - lm)

(In the last two a lacks multiples of ps, which that formula takes out again.) The passes and products are the head's, and
so is the way of a vocabulary cut over ranks: each has logits of its part, and they exchange a few numbers a token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.mesh.collectives import pmax, psum, pvary
from fstep.ops import head
from fstep.ops import head_passes as passes
from fstep.ops.head_passes import Part, chunks, round_size, widen
from fstep.trace import in_transform, is_recording

NOWHERE = -1e4  # a log probability that is 0 as a probability, and has no NaN for a gradient


class How(NamedTuple):
    """What is compared: the rows of the head that this rank has, the kind of divergence, and who the teacher is."""

    part: Part
    kind: str
    beta: float
    temperature: float
    top: bool  # the teacher is ids and log probabilities, not hidden states and a weight


def _compare(ls: Tensor, lt: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Return what each id adds to the divergence, and its a."""
    if how.kind == "forward":
        pt = lt.exp()
        return pt * torch.where(pt > 0, lt - ls, 0), -pt
    ps = ls.exp()
    if how.kind == "reverse":
        terms = ps * torch.where(ps > 0, ls - lt, 0)
        return terms, terms
    pt, lm = lt.exp(), torch.logaddexp(lt + math.log(how.beta), ls + math.log1p(-how.beta))
    own = (1 - how.beta) * ps * torch.where(ps > 0, ls - lm, 0)
    return how.beta * pt * torch.where(pt > 0, lt - lm, 0) + own, own


def _lse(z: Tensor, how: How) -> Tensor:
    """Return each row's logsumexp over the ranks, -inf where there is no id: the same on every rank."""
    top = pmax(z.detach().max(-1).values, axis=how.part.axis)
    top = top.masked_fill(top == -torch.inf, 0)
    sums = psum((z - top[:, None]).exp().sum(-1), axis=how.part.axis)
    some = sums > 0
    return torch.where(some, top + torch.where(some, sums, 1).log(), -torch.inf)


def _log_softmax(z: Tensor, lse: Tensor, how: How) -> Tensor:
    # Each rank takes what all have from logits of its own.
    return z - pvary(lse, axis=how.part.axis)[:, None]


def _with_all(z: Tensor, zt: Tensor, how: How, want: bool) -> tuple[Tensor, Tensor | None]:
    """Return the divergence of each row and, if wanted, the gradient of the logits z; both of a teacher's logits."""
    ls = _log_softmax(z, _lse(z, how), how)
    terms, a = _compare(ls, _log_softmax(zt, _lse(zt, how), how), how)
    if not want:
        return psum(terms.sum(-1), axis=how.part.axis), None
    found, slope = psum(torch.stack([terms.sum(-1), a.sum(-1)]), axis=how.part.axis)
    return found, a - ls.exp() * slope[:, None]


def _with_top(z: Tensor, ids: Tensor, lt: Tensor, how: How, want: bool) -> tuple[Tensor, Tensor | None]:
    """Return the same for a teacher's log probabilities at ids [n, k]: all other ids together are one more outcome."""
    here = how.part.find(ids, z.shape[1])
    at, lse = here >= 0, _lse(z, how)
    picked = torch.where(at, _log_softmax(z.gather(-1, here.clamp(min=0)), lse, how), 0)
    column = torch.where(at, here, z.shape[1])  # one column more, for ids of other ranks
    is_top = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool, device=z.device).scatter(-1, column, True)[:, :-1]
    others = z.masked_fill(is_top, -torch.inf)
    lse_others = _lse(others, how)
    # What the teacher's probabilities leave to 1 is known to their last digit only, and not below.
    left = torch.log1p(-lt.exp().sum(-1).clamp(max=1 - torch.finfo(lt.dtype).eps))
    some = lse_others > -torch.inf  # not where k is the whole vocabulary
    rest = torch.where(some, lse_others, 0) - lse
    # From here on every rank computes the same, of k + 1 outcomes.
    ls = torch.cat([psum(picked, axis=how.part.axis), torch.where(some, rest, NOWHERE)[:, None]], -1)
    terms, a = _compare(ls, torch.cat([lt, torch.where(some, left, NOWHERE)[:, None]], -1), how)
    if not want:
        return terms.sum(-1), None
    d = (z - lse[:, None]).exp() * -a.sum(-1, keepdim=True)
    d += a[:, -1:] * (others - torch.where(some, lse_others, 0)[:, None]).exp()
    d.scatter_add_(-1, here.clamp(min=0), torch.where(at, a[:, :-1], 0))
    return terms.sum(-1), d


def _logits(hidden: Tensor, weight: Tensor, how: How) -> Tensor:
    z = passes.product(hidden, weight)
    return z if how.temperature == 1.0 else z / how.temperature


def _plain(hidden: Tensor, weight: Tensor, one: Tensor, two: Tensor, weights: Tensor, how: How) -> Tensor:
    """Compute the weighted sum of all tokens at once, in operations that can be differentiated."""
    hidden, one, two = _only_counted(weights, hidden, one, two, how)
    z = passes.to_logits(hidden, weight, how.temperature)
    if how.top:
        found = _with_top(z, one, two, how, False)[0]
    else:
        found = _with_all(z, passes.to_logits(one, two, how.temperature), how, False)[0]
    return (torch.where(weights != 0, found, 0) * weights).sum()


def _only_counted(weights: Tensor, hidden: Tensor, one: Tensor, two: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """Put zeros where a token does not count: 0 times what else may stand there can be NaN."""
    out = (weights == 0)[:, None]
    if how.top:
        return hidden.masked_fill(out, 0), one.masked_fill(out, 0), two.to(widen(hidden)).masked_fill(out, NOWHERE)
    return hidden.masked_fill(out, 0), one.masked_fill(out, 0), two


def _pass(
    hidden: Tensor, weight: Tensor, one: Tensor, two: Tensor, weights: Tensor, how: How, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return each token's divergence, and the gradients of hidden and weight of their weighted sum."""
    hidden, one, two = _only_counted(weights, hidden, one, two, how)
    rounded, wide, want = weight.to(hidden.dtype), widen(hidden), want_hidden or want_weight
    teacher = two if how.top else two.to(one.dtype)
    found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    step = round_size(max(1, head._step(how.part, wide) // 2))  # two chunks of logits are there at a time
    groups = chunks(0, len(hidden), step * head.HELD * wide.itemsize // hidden.itemsize)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_weight = torch.empty_like(weight, dtype=passes.sum_dtype(hidden, weight, len(groups))) if want_weight else None
    for group in groups:
        d = passes.matrix(group.stop - group.start, len(weight), hidden, hidden.dtype) if want else None
        for at in chunks(group.start, group.stop, step):
            z = _logits(hidden[at], rounded, how)
            if how.top:
                found[at], slope = _with_top(z, one[at], teacher[at], how, want)
            else:
                found[at], slope = _with_all(z, _logits(one[at], teacher, how), how, want)
            if d is not None and slope is not None:
                slope *= (weights[at].to(wide) / how.temperature)[:, None]
                d[at.start - group.start : at.stop - group.start] = slope
            del z, slope
        if d is not None and d_hidden is not None:
            passes.add_product(d_hidden[group], d, rounded, first=True)
        if d is not None and d_weight is not None:
            passes.add_product(d_weight, d.T, hidden[group], first=group.start == 0)
        del d
    return torch.where(weights != 0, found, 0), [d_hidden, None if d_weight is None else d_weight.to(weight.dtype)]


class _Divergence(Function):
    # As the head's _LogprobSum: the gradient is taken for a cotangent of 1 when the forward pass is there anyway.
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, one: Tensor, two: Tensor, weights: Tensor, how: How, recording: bool
    ) -> Tensor:
        ctx.how = how
        ctx.want = [recording and ctx.needs_input_grad[i] for i in (0, 1, 4)]
        found, ctx.found = _pass(hidden, weight, one, two, weights, how, *ctx.want[:2])
        ctx.save_for_backward(hidden, weight, one, two, weights, found)
        return (found * weights).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, one, two, weights, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this backward pass
            given = [x.view_as(x) for x in (hidden, weight, weights)]
            total = _plain(given[0], given[1], one, two, given[2], ctx.how)
            wanted = [x for x, w in zip(given, ctx.want, strict=True) if w]
            grads = iter(torch.autograd.grad(total, wanted, g, create_graph=True))
            d = [next(grads) if w else None for w in ctx.want]
            return d[0], d[1], None, None, d[2], None, None
        # What was found is handed out, and may be added to by whoever gets it: a second pass finds it again.
        own, ctx.found = ctx.found, None
        if own is None:
            _, own = _pass(hidden, weight, one, two, weights, ctx.how, *ctx.want[:2])
        for x in own:
            if x is not None:
                passes.scale_(x, g)
        d_weights = (found * g).to(weights.dtype) if ctx.want[2] else None
        return own[0], own[1], None, None, d_weights, None, None


def divergence_sum(hidden: Tensor, weight: Tensor, one: Tensor, two: Tensor, weights: Tensor, how: How) -> Tensor:
    """Compute ``sum(weights * divergence)``; ``one`` and ``two`` are the teacher's, and have no gradient."""
    one, two = one.detach(), two.detach()
    if in_transform() or torch.compiler.is_compiling():
        return _plain(hidden, weight, one, two, weights, how)
    recording = is_recording(hidden, weight, weights)
    total: Tensor = _Divergence.apply(hidden, weight, one, two, weights, how, recording)  # type: ignore[no-untyped-call]
    return total
