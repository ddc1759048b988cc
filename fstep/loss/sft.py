"""Supervised fine-tuning: the negative log likelihood of the tokens that carry weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ratio import Ratio
from fstep.tree import check_type


def sft_loss(logprobs: Tensor, weights: Tensor) -> Ratio:
    """Return ``sum(-weight * logp)`` over ``sum(weight)`` as a `Ratio`.

    ``logprobs`` and ``weights`` are [tokens], aligned with the labels. A token of weight 0 is dropped, not multiplied by
    0, so that an infinite log probability there does no harm. Both sums are at least float32: a count of tokens that is
    rounded to bfloat16 would be wrong from 257 tokens on.

    Raises ValueError if the shapes differ.

    >>> import torch, fstep
    >>> fstep.sft_loss(torch.tensor([-1.0, -3.0, -torch.inf]), torch.tensor([1.0, 1.0, 0.0])).mean()
    tensor(2.)
    """
    check_type("sft_loss", "logprobs", logprobs, Tensor, "a tensor of log probabilities")
    check_type("sft_loss", "weights", weights, Tensor, "a tensor of weights")
    if logprobs.shape != weights.shape:
        raise ValueError(
            f"sft_loss: logprobs have shape {tuple(logprobs.shape)}, weights {tuple(weights.shape)}; give one weight a token"
        )
    counted = weights != 0
    # Dropped before the product as well as after: the gradient of inf * 0 is NaN too.
    wide = torch.promote_types(torch.promote_types(logprobs.dtype, weights.dtype), torch.float32)
    weights = weights.to(wide)
    terms = torch.where(counted, logprobs, 0) * weights
    return Ratio(-terms.sum(), weights.sum())
