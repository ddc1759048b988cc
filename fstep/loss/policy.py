"""Policy losses: what a step of reinforcement learning minimises, token by token.

              ratio      ... 1-low ...... 1 ...... 1+high ...... dual ...
    A > 0     gradient   A ratio   A ratio     A ratio    0            0        as likely as it may become
    A < 0     gradient   0         A ratio     A ratio    A ratio      0        as unlikely as it may become

A token's advantage says whether it should become more likely; the loss follows it until the ratio to the policy that drew
the token has moved far enough. Named algorithms are these functions with other advantages, weights and bounds:

                 loss                                  advantages                        weights (a token each)
    GRPO         clipped_loss                          group_advantages                  document_weights
    Dr. GRPO     clipped_loss                          group_advantages, no scale        1, counts L * document_weights
    DAPO         clipped_loss, high > low              group_advantages                  1
    GSPO         clipped_loss of cp_sequence_log_ratio group_advantages                  document_weights
    CISPO        cispo_loss                            group_advantages                  1
    RLOO         reinforce_loss                        group_advantages, "others"        1, counts document_weights
    REINFORCE++  clipped_loss                          whiten                            1
    PPO          clipped_loss, value_loss              whiten of gae                     1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fstep.loss.weigh import counted, over
from fstep.ratio import Ratio

FACTOR = ("importance",)  # what may be left out


def _check_bounds(function: str, low: float, high: float, dual: float | None = None) -> None:
    if not (low >= 0 and high >= 0):
        raise ValueError(
            f"{function}: low is {low} and high is {high}; pass numbers >= 0: the ratio is kept in [1 - low, 1 + high]"
        )
    if dual is not None and not dual > 1:
        raise ValueError(f"{function}: dual is {dual}; pass a ratio > 1, e.g. 3.0, or None for no bound")


def _product(factor: Tensor, logprobs: Tensor) -> Tensor:
    """Return ``-factor * logprobs``, where a factor of 0 leaves out an infinite log probability too."""
    return -factor * torch.where(factor == 0, 0, logprobs)


def clipped_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    importance: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Ratio, dict[str, Ratio]]:
    """Return PPO's clipped surrogate loss as a `Ratio`, and metrics. All arguments are [tokens].

    With ``r = exp(log_ratio)``, ``log_ratio = logprobs - old_logprobs``, and A the advantage::

        objective = min(r A, clip(r, 1 - low, 1 + high) A)        and, with ``dual`` = c, where A < 0:
        objective = max(objective, c A)
        num = sum(-weight * importance * objective),   den = sum(counts), or of the weights

    PPO: arXiv:1707.06347; ``high > low``: DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729. For GSPO pass
    `cp_sequence_log_ratio`. A token that is clipped has gradient exactly 0; on a bound it still has its gradient. Where the
    policy drew the tokens itself, ``logprobs - logprobs.detach()`` makes this REINFORCE. Advantages and ``importance`` (see
    `importance_weights`) are constants. Tokens of weight 0 are dropped, whatever is there.

    Metrics, by weight: ``ratio`` (1 in the first step on a batch, then near it), ``clip_low``, ``clip_high`` and
    ``clip_dual`` (tokens without gradient on each side: 0 in the first step, a few percent later; much more means the
    steps are too large or too many), ``kl_old`` (mean of ``r - 1 - log r``: how far the policy has moved from the old one).

    Raises ValueError for shapes that differ, negative bounds, ``dual <= 1``.

    >>> import torch, fstep
    >>> old, logprobs = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -2.1, -torch.inf])
    >>> advantages, weights = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    >>> loss, metrics = fstep.clipped_loss(logprobs - old, advantages, weights)
    >>> loss, metrics["clip_high"].mean()  # -(1.2 - exp(-0.1)); the first token's ratio is exp(0.5)
    (Ratio(num=tensor(-0.2952), den=tensor(2.)), tensor(0.5000))
    """
    function = "clipped_loss"
    _check_bounds(function, low, high, dual)
    _, weights, (log_ratio, advantages, importance) = counted(
        function, weights, optional=FACTOR, log_ratio=log_ratio, advantages=advantages, importance=importance
    )
    advantages, importance = advantages.detach(), importance.detach()
    ratio = log_ratio.detach().exp()
    rises, falls = advantages > 0, advantages < 0
    too_high, too_low = rises & (ratio > 1 + high), falls & (ratio < 1 - low)
    too_bad = falls & (ratio > (math.inf if dual is None else dual))
    bound = torch.ones_like(ratio).masked_fill(too_high, 1 + high).masked_fill(too_low, 1 - low)
    bound = bound.masked_fill(too_bad, 1.0 if dual is None else dual)
    # The ratio of a token that is clipped, or that has no part in the loss, is never exponentiated where autograd sees it:
    # it may be infinite, and 0 times that is no gradient.
    live = ~(too_high | too_low | too_bad | (importance * advantages == 0))
    factor = torch.where(live, torch.where(live, log_ratio, 0).exp(), bound)
    loss = over(function, -importance * factor * advantages, weights, counts)
    kept = log_ratio.detach()
    measured = {
        "ratio": ratio,
        "clip_low": too_low,
        "clip_high": too_high,
        "clip_dual": too_bad,
        "kl_old": kept.expm1() - kept,
    }
    return loss, {name: over(function, x.to(ratio.dtype), weights.detach(), None) for name, x in measured.items()}


def cispo_loss(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    low: float = math.inf,
    high: float = 0.2,
    importance: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Ratio, dict[str, Ratio]]:
    """Return CISPO's loss as a `Ratio`, and metrics. All arguments are [tokens].

    The ratio is clipped and held constant, so that every token keeps a gradient (MiniMax-M1, arXiv:2506.13585)::

        num = sum(-weight * importance * clip(exp(log_ratio), 1 - low, 1 + high).detach() * A * logprob)
        den = sum(counts), or of the weights

    ``log_ratio = logprobs - old_logprobs``; by default there is no lower bound, as in the paper. Metrics, by weight:
    ``ratio``, ``clip_low``, ``clip_high`` (how much is clipped, on whichever side of the advantage).

    Raises ValueError for shapes that differ and negative bounds.

    >>> import torch, fstep
    >>> old, logprobs = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.0])
    >>> loss, _ = fstep.cispo_loss(logprobs, logprobs - old, torch.tensor([1.0, -1.0]), torch.ones(2))
    >>> loss.num  # 1.2 * 0.5 - 2
    tensor(-1.4000)
    """
    function = "cispo_loss"
    _check_bounds(function, low, high)
    _, weights, (logprobs, log_ratio, advantages, importance) = counted(
        function,
        weights,
        optional=FACTOR,
        logprobs=logprobs,
        log_ratio=log_ratio,
        advantages=advantages,
        importance=importance,
    )
    ratio = log_ratio.detach().exp()
    factor = ratio.clamp(1 - low, 1 + high) * importance.detach() * advantages.detach()
    loss = over(function, _product(factor, logprobs), weights, counts)
    measured = {"ratio": ratio, "clip_low": ratio < 1 - low, "clip_high": ratio > 1 + high}
    return loss, {name: over(function, x.to(ratio.dtype), weights.detach(), None) for name, x in measured.items()}


def reinforce_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    importance: Tensor | None = None,
    counts: Tensor | None = None,
) -> Ratio:
    """Return ``sum(-weight * importance * A * logprob)`` over ``sum(counts)``, or of the weights, as a `Ratio`. [tokens]

    The policy gradient itself, for tokens the policy has just drawn (Williams 1992; with `group_advantages` of
    ``baseline="others"`` RLOO, arXiv:2402.14740, whose sum over an answer takes ``counts=document_weights(batch)``).
    Advantages and ``importance`` are constants. Its value says nothing: look at rewards.

    Raises ValueError for shapes that differ.

    >>> import torch, fstep
    >>> logprobs = torch.tensor([-1.0, -2.0, -torch.inf])
    >>> fstep.reinforce_loss(logprobs, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    Ratio(num=tensor(-1.), den=tensor(2.))
    """
    _, weights, (logprobs, advantages, importance) = counted(
        "reinforce_loss", weights, optional=FACTOR, logprobs=logprobs, advantages=advantages, importance=importance
    )
    return over("reinforce_loss", _product(importance.detach() * advantages.detach(), logprobs), weights, counts)
