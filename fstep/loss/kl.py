"""The distance to another policy, from tokens that were drawn: three estimators, their gradients, and which is right.

    d = logprob - ref_logprob of a token that the policy drew

          value of the term         its mean is       gradient of the term       the mean of which is the gradient of
    k1    d                         KL(policy, ref)   grad logprob               nothing: its mean is 0
    k2    d^2 / 2                   near it           d * grad logprob           KL(policy, ref)
    k3    exp(-d) - 1 + d           KL(policy, ref)   (1 - exp(-d)) grad logprob KL(ref, policy), the other way round

The value of an estimator and the gradient of it are two things: a mean over what the policy draws depends on the policy
through the drawing as well. With ``log_ratio`` that dependence is in the term, and value and gradient are both right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fstep.loss.weigh import counted, over
from fstep.ratio import Ratio

ESTIMATORS = ("k1", "k2", "k3")


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    weights: Tensor,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    log_ratio: Tensor | None = None,
    bound: float | None = 20.0,
    cap: float | None = None,
    counts: Tensor | None = None,
) -> Ratio:
    """Return ``sum(weight * k)`` over ``sum(counts)``, or of the weights, as a `Ratio`. All arguments are [tokens].

    With ``d = logprobs - ref_logprobs``: ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d`` (Schulman 2020,
    "Approximating KL divergence"). k3 is GRPO's penalty (arXiv:2402.03300) and the one to report; k2 is the penalty whose
    gradient is that of KL(policy, ref) for tokens the policy drew itself. (arXiv:2506.09477 and 2510.01555 derive which is
    which.) With ``log_ratio = logprobs - old_logprobs`` each term is multiplied by ``exp(log_ratio)``, not detached: then k1
    and k3 have the value and the gradient of KL(policy, ref), also for tokens that the old policy drew. As a reward, not a
    loss, k1 is ``-beta * (old_logprobs - ref_logprobs)``, and its policy gradient is right as well. All this is about the
    distribution of each token after those before it: that drifting early changes what comes later, only a reward sees.

    ``bound`` clamps d for k3 to [-bound, bound] before the exponential, ``cap`` then k3 to at most that much. Past either
    the gradient is exactly 0; on it, it is still there. No gradient goes to ``ref_logprobs``. To measure only, detach the
    result. It is near 0 at first and grows slowly; k3 is never negative.

    Raises ValueError for shapes that differ, an unknown estimator, a bound or cap that is not positive or is not for k3.

    >>> import torch, fstep
    >>> logprobs, ref = torch.tensor([-1.0, -2.0, -torch.inf]), torch.tensor([-1.5, -2.0, -torch.inf])
    >>> fstep.kl_loss(logprobs, ref, torch.tensor([1.0, 1.0, 0.0])).mean()  # (exp(-0.5) - 1 + 0.5) / 2
    tensor(0.0533)
    """
    function = "kl_loss"
    if estimator not in ESTIMATORS:
        raise ValueError(f"{function}: estimator is {estimator!r}; pass one of {', '.join(ESTIMATORS)}")
    for name, limit in (("bound", bound), ("cap", cap)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{function}: {name} is {limit}; pass a positive number, or None for no limit")
    if cap is not None and estimator != "k3":
        raise ValueError(f"{function}: cap is {cap} and limits k3 only; leave it out for {estimator}")
    _, weights, (logprobs, ref_logprobs) = counted(function, weights, logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = logprobs - ref_logprobs.detach()
    if estimator == "k1":
        terms = d
    elif estimator == "k2":
        terms = d.square() / 2
    else:
        d = d if bound is None else d.clamp(-bound, bound)
        terms = torch.expm1(-d) + d  # exp(-d) - 1 would keep no digit of a small one
        if cap is not None:  # dropped before the exponential: 0 times the gradient of an infinite one is NaN
            above = terms.detach() > cap
            d = torch.where(above, 0, d)
            terms = torch.where(above, cap, torch.expm1(-d) + d)
    if log_ratio is not None:
        _, _, (log_ratio,) = counted(function, weights, log_ratio=log_ratio)
        terms = terms * log_ratio.exp()
    return over(function, terms, weights, counts)
