"""KTO: answers that are good or bad, each on its own, without pairs.

    good   weight * (1 - sigmoid(beta (R - kl)))         R = log pi(y|x) - log ref(y|x), summed over the answer
    bad    weight * (1 - sigmoid(beta (kl - R)))         kl: one number for the whole batch, from a pass before

The baseline ``kl`` is how far the model has moved in general: the mean of R over *mismatched* answers (prompt i with the
answer to prompt j), over the whole batch of the step. A mean over a microbatch would make the loss depend on how the batch
is cut, so the step computes it first, and passes in the number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.loss.pairs import Scored, check_positive, total
from fstep.ratio import Ratio
from fstep.tree import check_type


def kto_kl(ratios: Ratio) -> Ratio:
    """Return the sum of R over mismatched answers and their number, of one microbatch: its mean is the baseline of KTO.

    ``ratios`` is what `cp_sequence_sums` makes of ``logp - ref_logp`` for mismatched documents; those without weight are
    left out. It is detached. Added up over microbatches and ranks and divided once, it is the same for every cut::

        parts = pp_forward(stage, lambda p, x, mb: as_partial(kto_kl(ratios_of(p, x, mb)), axis=mesh.cp), params, mismatched)
        kl = psum(sum(parts[1:], parts[0]), axis=mesh.over("dp", "cp")).mean()

    >>> import torch, fstep
    >>> fstep.kto_kl(fstep.Ratio(torch.tensor([0.5, 1.5, 0.0]), torch.tensor([4.0, 2.0, 0.0])))
    Ratio(num=tensor(2.), den=tensor(2.))
    """
    r, weights = _documents("kto_kl", ratios)
    return total(r, weights).detach()


def kto_loss(
    ratios: Ratio,
    chosen: Tensor,
    *,
    beta: float,
    kl: Tensor | float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Scored:
    """Return the loss of Kahneman-Tversky Optimization (arXiv 2402.01306), and metrics.

    ``desirable * (1 - sigmoid(beta * (R - kl)))`` for good answers, ``undesirable * (1 - sigmoid(beta * (kl - R)))`` for
    bad ones. ``ratios`` is a Ratio of [documents] as for `dpo_loss`, ``chosen`` [documents] says which are good, ``kl`` is
    the mean of `kto_kl` over the step's whole batch (or 0): it is detached, and taken to be 0 where it is below.

    The Ratio is over documents. Metrics: ``reward_chosen`` (beta R of the good: starts at 0 and rises), ``reward_rejected``
    (falls), ``kl`` (the baseline: small against 1 / beta, or the model runs away). The loss starts at half the weights.

    Raises ValueError for a ``beta`` that is not positive and shapes that do not fit.

    >>> import torch, fstep
    >>> ratios = fstep.Ratio(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))
    >>> loss, metrics = fstep.kto_loss(ratios, torch.tensor([True, False]), beta=0.5, kl=0.0)
    >>> loss  # (1 - sigmoid(1)) + (1 - sigmoid(0))
    Ratio(num=tensor(0.7689), den=tensor(2.))
    """
    check_positive("kto_loss", beta=beta)
    check_type("kto_loss", "chosen", chosen, Tensor, 'one flag a document, e.g. mb.per_document["chosen"]')
    r, weights = _documents("kto_loss", ratios)
    if chosen.shape != r.shape:
        raise ValueError(f"kto_loss: chosen is {tuple(chosen.shape)} for {len(r)} documents; give one flag a document")
    base = torch.as_tensor(kl, dtype=r.dtype, device=r.device).detach().clamp(min=0)
    if base.dim():
        raise ValueError(f"kto_loss: kl has shape {tuple(base.shape)}; pass one number, the mean over the whole batch")
    good = chosen != 0
    gain = torch.where(good, r - base, base - r)
    factor = desirable * good.to(r.dtype) + undesirable * (~good).to(r.dtype)
    terms = factor * torch.sigmoid(-beta * gain)
    metrics = {
        "reward_chosen": total(beta * r, torch.where(good, weights, 0)).detach(),
        "reward_rejected": total(beta * r, torch.where(good, 0, weights)).detach(),
        "kl": total(base.expand_as(r), weights).detach(),
    }
    return total(terms, weights), metrics


def _documents(function: str, ratios: Ratio) -> tuple[Tensor, Tensor]:
    """Return each document's R, and 1 where it has weight."""
    check_type(function, "ratios", ratios, Ratio, "what cp_sequence_sums returns")
    if ratios.num.dim() != 1 or ratios.den.shape != ratios.num.shape:
        raise ValueError(
            f"{function}: ratios is a Ratio of {tuple(ratios.num.shape)} and {tuple(ratios.den.shape)}; pass sums of "
            "[documents], as cp_sequence_sums returns"
        )
    there = ratios.den != 0
    wide = torch.promote_types(ratios.num.dtype, torch.float32)
    return torch.where(there, ratios.num, 0).to(wide), there.to(wide)
