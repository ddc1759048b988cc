"""Reward models: a number for each answer, higher for the better of two.

hidden [T, dim] ── linear ── [T] ── cp_sequence_last ── rewards [documents] ── bradley_terry_loss
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fstep.loss.pairs import Pairs, Scored, compared, reward_metrics, total
from fstep.ratio import Ratio
from fstep.tree import check_type


def bradley_terry_loss(rewards: Tensor, pairs: Pairs, *, margin: Tensor | float = 0.0, center: float = 0.0) -> Scored:
    """Return the loss of a reward model (Bradley and Terry, 1952; with a margin: arXiv 2307.09288), and metrics.

    ``-log sigmoid(r_chosen - r_rejected - margin) + center * (r_chosen + r_rejected)^2``. ``rewards`` is [documents], as
    from `cp_sequence_last`; ``margin`` a number, or [documents] of which the chosen one's is taken: how much better it has
    to be. ``center`` draws rewards to 0 (arXiv 2312.09244), which the difference alone leaves open. A pair of weight 0 is
    dropped, whatever its rewards are.

    The Ratio is over pairs. Metrics: ``accuracy`` (a tie is half; starts near 0.5 and rises; 0.65 to 0.8 is usual for human
    labels), ``reward_margin``, ``reward_chosen``, ``reward_rejected``.

    Raises ValueError for shapes that do not fit.

    >>> import torch, fstep
    >>> pairs = fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([False, True]))
    >>> fstep.bradley_terry_loss(torch.tensor([1.0, 3.0]), pairs, margin=1.0)[0].mean()
    tensor(0.3133)
    """
    check_type("bradley_terry_loss", "rewards", rewards, Tensor, "one reward a document, as cp_sequence_last returns")
    chosen, rejected, weights = compared("bradley_terry_loss", Ratio(rewards, torch.ones_like(rewards)), pairs)
    c, r = chosen.num, rejected.num
    if isinstance(margin, Tensor) and margin.dim():
        if margin.shape != rewards.shape:
            raise ValueError(
                f"bradley_terry_loss: margin is {tuple(margin.shape)} for {len(rewards)} documents; give one a document, or "
                "one number"
            )
        margin = torch.where(weights != 0, margin[pairs.chosen], 0)
    terms = -logsigmoid(c - r - margin)
    if center:
        terms = terms + center * (c + r).square()
    return total(terms, weights), reward_metrics(c, r, weights)
