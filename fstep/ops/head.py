"""From hidden states to log probabilities of the labels, without ever holding a [tokens, vocab] matrix.

    logits = hidden @ weight.T / temperature        [chunk, vocab], a chunk of tokens at a time
    logp   = logits[label] - logsumexp(logits)      [tokens], float32

This is the one place that turns hidden states into probabilities: training, scoring and evaluation call it, and the
temperature is applied here and nowhere else. What it costs are products of tokens x vocab x dim:

    token_logprobs       1 forward; 3 backward, since each block of logits is computed again: any loss of log probabilities
    token_logprob_sum    3 forward, 0 backward: where the loss is a weighted sum of them, the gradient is known at once
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import Function

from fstep.batch.packed import IGNORE
from fstep.ops import head_passes as passes
from fstep.ops.head_passes import Part, chunks, round_size, widen
from fstep.ops.layers import check_ids
from fstep.trace import in_transform, is_recording
from fstep.tree import check_type

CHUNK_BYTES = 1 << 28  # of one chunk's logits
HELD = 3  # times as many bytes of the logits' gradients: for all of them the weight's is read and written once
TOKENS = 16384  # whose hidden states' gradient is held in float32 while the vocabulary goes by


def head_logits(hidden: Tensor, weight: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``hidden @ weight.T / temperature``, at least float32: [tokens, vocab].

    For a few tokens at a time, as in generation; `token_logprobs` is for whole batches. Raises ValueError for shapes or
    dtypes that do not fit, and for a temperature that is not positive (the most likely token is ``argmax`` of any).

    >>> import torch, fstep
    >>> fstep.head_logits(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), temperature=0.5)
    tensor([[6., 2.]])
    """
    _check("head_logits", hidden, weight, temperature)
    return passes.to_logits(hidden, weight, temperature)


def _check(function: str, hidden: Tensor, weight: Tensor, temperature: float) -> None:
    fits = weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1]
    if not fits or torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        raise ValueError(
            f"{function}: hidden is {hidden.dtype} {tuple(hidden.shape)} and weight {weight.dtype} {tuple(weight.shape)}; "
            "they are [tokens, dim] and [vocab, dim], of one dtype, or the weight of a wider one"
        )
    if isinstance(temperature, Tensor):
        raise TypeError(f"{function}: temperature is a tensor, and no gradient reaches it; pass a number")
    if not temperature > 0:
        raise ValueError(f"{function}: temperature is {temperature}; pass a positive number")


# Chunks ------------------------------------------------------------------------------------------------------------------


def _chunk(vocab: int, itemsize: int) -> int:
    return min(1024, max(128, CHUNK_BYTES // (vocab * itemsize)))


def _step(part: Part, wide: torch.dtype) -> int:
    """Return how many tokens' logits are computed at a time: the same on every rank."""
    return round_size(_chunk(-(-part.vocab // part.axis.size), wide.itemsize))


class _Logprobs(Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, part: Part, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        here, rounded = part.find(labels, len(weight)), weight.to(hidden.dtype)
        found = [
            passes.summarize(passes.product(hidden[at], rounded), here[at], temperature, entropy)
            for at in chunks(0, len(hidden), _step(part, widen(hidden)))
        ]
        top, sums = torch.cat([top for top, _ in found]), torch.cat([sums for _, sums in found], 1)
        return part.join(top, sums, labels, here)  # ranks exchange once, after all chunks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, labels, ctx.part, ctx.temperature, ctx.entropy = inputs
        ctx.save_for_backward(hidden, weight, labels, output[1], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropy, lse = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Somebody differentiates this backward pass: compute it in operations that allow it. On views, since a tied
            # weight is what hidden was computed from, and its gradient here is the head's part alone.
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
            outs = [x for x in passes.plain(hidden, weight, labels, ctx.part, ctx.temperature, ctx.entropy) if x is not None]
            wanted = [x for x, want in ((hidden, want_hidden), (weight, want_weight)) if want]
            grads = iter(torch.autograd.grad(outs, wanted, (g_logp, g_entropy)[: len(outs)], create_graph=True))
            return next(grads) if want_hidden else None, next(grads) if want_weight else None, None, None, None, None

        wide, counted = lse.dtype, labels != IGNORE
        g = torch.where(counted, g_logp, 0)
        h = torch.where(counted, g_entropy, 0) if ctx.entropy else None
        # A block of the vocabulary for all tokens: what is added up over the blocks, and so read and written for each, is
        # the gradient of the hidden states, and that of the weight is written once.
        some = chunks(0, len(hidden), TOKENS)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.empty_like(weight, dtype=passes.sum_dtype(hidden, weight, len(some))) if want_weight else None
        for at in some:
            n = at.stop - at.start
            h_at = None if h is None else h[at]
            kept = passes.without(hidden[at], g[at], h_at) if want_weight else None
            blocks = chunks(0, len(weight), round_size(_step(ctx.part, wide) * len(weight) // max(n, 1)))
            total = d_hidden[at] if d_hidden is not None else hidden[:0]
            if len(blocks) > 1:
                total = torch.empty_like(total, dtype=wide)
            for ids in blocks:
                block = weight[ids].to(hidden.dtype)
                d = passes.matrix(n, len(block), hidden, hidden.dtype)
                here = ctx.part._replace(start=ctx.part.start + ids.start).find(labels[at], len(block))
                passes.differentiate(
                    passes.product(hidden[at], block), here, lse[at], g[at], h_at, entropy[at], ctx.temperature, d
                )
                if want_hidden:
                    passes.add_product(total, d, block, first=ids.start == 0)
                if d_weight is not None and kept is not None:
                    passes.add_product(d_weight[ids], d.T, kept, first=at.start == 0)
                del d
            if d_hidden is not None and len(blocks) > 1:
                d_hidden[at] = total
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


class _LogprobSum(Function):
    # The gradient is taken for a cotangent of -1, that of a negative log likelihood, when the forward pass is there anyway.
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, part: Part, temperature: float,
        recording: bool,
    ) -> Tensor:  # fmt: skip
        ctx.part, ctx.temperature = part, temperature
        ctx.want = [recording and n for n in ctx.needs_input_grad[:4]]
        logp, ctx.found = _downhill(hidden, weight, labels, weights, part, temperature, *ctx.want[:2])
        ctx.save_for_backward(hidden, weight, labels, weights, logp)
        return _weighted(logp, weights, labels)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, weights, logp = ctx.saved_tensors
        nothing = (None, None, None)
        if torch.is_grad_enabled():  # as in _Logprobs
            given = [x.view_as(x) for x in (hidden, weight, weights)]
            again, _ = passes.plain(given[0], given[1], passes.counted(labels, weights), ctx.part, ctx.temperature, False)
            total = _weighted(again, given[2], labels)
            want = [ctx.want[0], ctx.want[1], ctx.want[3]]
            wanted = [x for x, w in zip(given, want, strict=True) if w]
            grads = iter(torch.autograd.grad(total, wanted, g, create_graph=True))
            d = [next(grads) if w else None for w in want]
            return d[0], d[1], None, d[2], *nothing
        # What was found is handed out, and may be added to by whoever gets it: a second pass finds it again.
        found, ctx.found = ctx.found, None
        if found is None:
            _, found = _downhill(hidden, weight, labels, weights, ctx.part, ctx.temperature, *ctx.want[:2])
        for x in found:
            if x is not None:
                passes.scale_(x, -g)
        d_weights = (_dropped(logp, weights) * g).to(weights.dtype) if ctx.want[3] else None
        return found[0], found[1], None, d_weights, *nothing


def _weighted(logp: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    weights = torch.where(labels != IGNORE, weights, 0)  # where there is no label the weight may be anything
    return _dropped(logp, weights).mul(weights).sum()


def _dropped(logp: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights != 0, logp, 0)


def _downhill(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, part: Part, temperature: float,
    want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Return log probabilities, and the gradients of hidden and weight of minus their weighted sum."""
    here, rounded, wide = part.find(labels, len(weight)), weight.to(hidden.dtype), widen(hidden)
    g = torch.where((labels != IGNORE) & (weights != 0), -weights.to(wide), 0)
    logp, step = torch.empty_like(g), _step(part, wide)
    groups = chunks(0, len(hidden), step * HELD * wide.itemsize // hidden.itemsize)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_weight = torch.empty_like(weight, dtype=passes.sum_dtype(hidden, weight, len(groups))) if want_weight else None
    for group in groups:
        wanted = want_hidden or want_weight
        d = passes.matrix(group.stop - group.start, len(weight), hidden, hidden.dtype) if wanted else None
        for at in chunks(group.start, group.stop, step):
            logits = passes.product(hidden[at], rounded)
            top, sums = passes.summarize(logits, here[at], temperature, False)
            logp[at], _, lse = part.join(top, sums, labels[at], here[at])
            if d is not None:
                rows = slice(at.start - group.start, at.stop - group.start)  # a view kept by name would keep d
                passes.differentiate(logits, here[at], lse, g[at], None, None, temperature, d[rows])
            del logits
        if d is not None and d_hidden is not None:
            passes.add_product(d_hidden[group], d, rounded, first=True)
        if d is not None and d_weight is not None:
            passes.add_product(d_weight, d.T, passes.without(hidden[group], g[group]), first=group.start == 0)
        del d
    return logp, [d_hidden, None if d_weight is None else d_weight.to(weight.dtype)]


# The functions -----------------------------------------------------------------------------------------------------------


def score(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: Part, temperature: float, entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log probabilities, and the entropy if asked for, from hidden states of all tokens and a part of the head."""
    how: Any = (hidden, weight, labels, part, temperature, entropy)
    logp, ent = passes.plain(*how) if in_transform() else _Logprobs.apply(*how)[:2]  # type: ignore[no-untyped-call]
    return (logp, ent) if entropy else logp  # type: ignore[return-value]


def score_sum(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, part: Part, temperature: float) -> Tensor:
    """Compute the weighted sum of log probabilities likewise."""
    if in_transform() or torch.compiler.is_compiling():
        logp: Any = score(hidden, weight, passes.counted(labels, weights), part, temperature, False)
        return _weighted(logp, weights, labels)
    recording = is_recording(hidden, weight, weights)
    total: Tensor = _LogprobSum.apply(hidden, weight, labels, weights, part, temperature, recording)  # type: ignore[no-untyped-call]
    return total


def _check_tokens(function: str, hidden: Tensor, weight: Tensor, temperature: float, **per_token: Tensor) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), *per_token.items()):
        check_type(function, name, x, Tensor, "a tensor")
    _check(function, hidden, weight, temperature)
    for name, x in per_token.items():
        if hidden.dim() != 2 or x.shape != hidden.shape[:1]:
            raise ValueError(
                f"{function}: hidden {tuple(hidden.shape)} and {name} {tuple(x.shape)} do not fit; they are "
                "[tokens, dim] and [tokens]"
            )
    check_ids(function, "label", per_token["labels"], len(weight), ignore=IGNORE)


@overload
def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = ..., entropy: Literal[False] = ...
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = ..., entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log probability of each label: [tokens], float32 (float64 for float64 inputs).

    ``hidden`` is [tokens, dim], ``weight`` [vocab, dim], ``labels`` [tokens]. ``logp[t] = z[labels[t]] - logsumexp(z)`` with
    ``z = hidden[t] @ weight.T / temperature``; a label of -100 gives 0 and no gradient. With ``entropy=True`` also the
    entropy of each distribution, ``-sum(p * log p)``. A weight of a wider dtype than ``hidden`` is rounded for the products,
    and its gradient is not.

    Raises ValueError for shapes or dtypes that do not fit, a temperature that is not positive and, on the CPU, a label past
    the vocabulary; on CUDA such a label's log probability is NaN.

    >>> import torch, fstep
    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> fstep.token_logprobs(torch.zeros(2, 1), weight, torch.tensor([1, -100]))
    tensor([-0.6931,  0.0000])
    """
    _check_tokens("token_logprobs", hidden, weight, temperature, labels=labels)
    return score(hidden, weight, labels, Part.all_of(weight), temperature, entropy)


def token_logprob_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return ``sum(weights * token_logprobs(hidden, weight, labels))``, 0-d, faster where the weights are known before.

    ``weights`` is [tokens], and for supervised fine-tuning the loss is ``Ratio(-sum, weights.sum())``. As the loss is linear
    in the log probabilities, its gradient is taken in the forward pass, when the logits are there: three products in all
    instead of four. From then on the gradients of ``hidden`` and ``weight`` are held, for the backward pass to hand out.

    A token whose label is -100 or whose weight is 0 is dropped, not multiplied by 0: it adds nothing and has no gradient,
    nor has its weight. Gradients of gradients, torch.func and torch.compile take the way of `token_logprobs`.

    Raises ValueError as `token_logprobs`, and for ``weights`` that do not fit.

    >>> import torch, fstep
    >>> weight, weights = torch.tensor([[0.0], [1.0]]), torch.tensor([2.0, 1.0])
    >>> fstep.token_logprob_sum(torch.zeros(2, 1), weight, torch.tensor([1, -100]), weights)
    tensor(-1.3863)
    """
    _check_tokens("token_logprob_sum", hidden, weight, temperature, labels=labels, weights=weights)
    return score_sum(hidden, weight, labels, weights, Part.all_of(weight), temperature)
