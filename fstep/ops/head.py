"""From hidden states to log probabilities of the labels, without ever holding a [tokens, vocab] matrix.

    logits = hidden @ weight.T / temperature        [chunk, vocab], a chunk of tokens at a time
    logp   = logits[label] - logsumexp(logits)      [tokens], float32

This is the one place that turns hidden states into probabilities: training, scoring and evaluation call it, and the
temperature is applied here and nowhere else. The backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fstep.batch.packed import IGNORE
from fstep.ops.layers import check_ids
from fstep.trace import in_transform
from fstep.tree import check_type

CHUNK_BYTES = 1 << 28  # of one chunk's logits


def head_logits(hidden: Tensor, weight: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``hidden @ weight.T / temperature``, at least float32: [tokens, vocab].

    For a few tokens at a time, as in generation; `token_logprobs` is for whole batches. Raises ValueError for shapes or
    dtypes that do not fit, and for a temperature that is not positive (the most likely token is ``argmax`` of any).

    >>> import torch, fstep
    >>> fstep.head_logits(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), temperature=0.5)
    tensor([[6., 2.]])
    """
    _check("head_logits", hidden, weight, temperature)
    return _logits(hidden, weight, temperature)


def _check(function: str, hidden: Tensor, weight: Tensor, temperature: float) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{function}: hidden is {hidden.dtype} {tuple(hidden.shape)} and weight {weight.dtype} {tuple(weight.shape)}; "
            "they are [tokens, dim] and [vocab, dim], of one dtype"
        )
    if isinstance(temperature, Tensor):
        raise TypeError(f"{function}: temperature is a tensor, and no gradient reaches it; pass a number")
    if not temperature > 0:
        raise ValueError(f"{function}: temperature is {temperature}; pass a positive number")


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def _logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probability and entropy (0 where there is no label) and logsumexp of some tokens, in plain operations."""
    logits = _logits(hidden, weight, temperature)
    lse = logits.logsumexp(-1)
    counted = labels != IGNORE
    logp = logits.gather(-1, torch.where(counted, labels, 0)[:, None])[:, 0] - lse
    # Not lse - sum(p * logits), where the rounding of lse grows with the size of the logits.
    logp_all = logits - lse[:, None]
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return torch.where(counted, logp, 0), torch.where(counted, entropy, 0), lse


def _chunk(vocab: int, itemsize: int) -> int:
    return min(1024, max(128, CHUNK_BYTES // (vocab * itemsize)))


def _through_product(
    d: Tensor, hidden: Tensor, weight: Tensor, temperature: float, d_hidden: Tensor | None, d_weight: Tensor | None
) -> None:
    """Pull the gradient ``d`` of some tokens' logits, used up here, back to hidden states (written) and weight (added)."""
    if temperature != 1.0:
        d /= temperature
    d = d.to(hidden.dtype)
    if d_hidden is not None:
        d_hidden.copy_(d @ weight)
    if d_weight is not None:
        d_weight += d.T @ hidden


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out = [torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3)]
        step = _chunk(weight.shape[0], wide.itemsize)
        for start in range(0, len(hidden), step):
            at = slice(start, start + step)
            logits = _logits(hidden[at], weight, temperature)
            lse = logits.logsumexp(-1)
            counted = labels[at] != IGNORE
            logp = logits.gather(-1, torch.where(counted, labels[at], 0)[:, None])[:, 0] - lse
            out[0][at] = torch.where(counted, logp, 0)
            out[2][at] = lse
            if entropy:
                logp_all = logits.sub_(lse[:, None])
                out[1][at] = torch.where(counted, -(logp_all.exp() * logp_all).sum(-1), 0)
        return out[0], out[1], out[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, labels, ctx.temperature, ctx.entropy = inputs
        ctx.save_for_backward(hidden, weight, labels, output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse_all = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Somebody differentiates this backward pass: compute it in operations that allow it. On views, since a tied
            # weight is what hidden was computed from, and its gradient here is the head's part alone.
            hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
            logp, entropy, _ = _logprobs(hidden, weight, labels, ctx.temperature)
            wanted = [x for x, want in ((hidden, want_hidden), (weight, want_weight)) if want]
            outs, gs = ((logp, entropy), (g_logp, g_entropy)) if ctx.entropy else ((logp,), (g_logp,))
            grads = iter(torch.autograd.grad(outs, wanted, gs, create_graph=True))
            return next(grads) if want_hidden else None, next(grads) if want_weight else None, None, None, None

        wide = lse_all.dtype
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        step = _chunk(weight.shape[0], wide.itemsize)
        for start in range(0, len(hidden), step):
            at = slice(start, start + step)
            h, lse = hidden[at], lse_all[at, None]
            counted = (labels[at] != IGNORE)[:, None]
            g = torch.where(counted, g_logp[at, None], 0)
            logits = _logits(h, weight, ctx.temperature)
            if ctx.entropy:
                # d entropy / d logits = -p (log p + entropy); d logp / d logits = onehot - p
                logp_all = logits.sub_(lse)
                p = logp_all.exp()
                entropy = -(p * logp_all).sum(-1, keepdim=True)
                ge = torch.where(counted, g_entropy[at, None], 0)
                d = -p * (g + ge * (logp_all + entropy))
            else:
                d = logits.sub_(lse).exp_().mul_(-g)
            d.scatter_add_(-1, torch.where(counted, labels[at, None], 0), g)
            _through_product(d, h, weight, ctx.temperature, None if d_hidden is None else d_hidden[at], d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


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
    entropy of each distribution, ``-sum(p * log p)``.

    Raises ValueError for shapes or dtypes that do not fit, a temperature that is not positive and, on the CPU, a label past
    the vocabulary.

    >>> import torch, fstep
    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> fstep.token_logprobs(torch.zeros(2, 1), weight, torch.tensor([1, -100]))
    tensor([-0.6931,  0.0000])
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_type("token_logprobs", name, x, Tensor, "a tensor")
    _check("token_logprobs", hidden, weight, temperature)
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logprobs: hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not fit; they are "
            "[tokens, dim] and [tokens]"
        )
    if in_transform():
        logp, ent, _ = _logprobs(hidden, weight, labels, temperature)
        return (logp, ent) if entropy else logp
    check_ids("token_logprobs", "label", labels, len(weight), ignore=IGNORE)
    logp, ent, _ = _ChunkedLogprobs.apply(hidden, weight, labels, temperature, entropy)  # type: ignore[no-untyped-call]
    return (logp, ent) if entropy else logp
