"""Preference losses: of two answers to a prompt one is better, and the model shall say so.

    DPO     -log sigmoid(z)                  z = beta (R_chosen - R_rejected)      R = log pi(y|x) - log ref(y|x), a sum
    IPO     (R_chosen - R_rejected - 1 / (2 beta))^2
    SimPO   -log sigmoid(z)                  z = beta (m_chosen - m_rejected) - margin         m = mean log pi of a token
    ORPO    -m_chosen - beta log sigmoid(z)  z = log odds(m_chosen) - log odds(m_rejected)

Each takes numbers of documents (`cp_sequence_sums`) and which are compared (`find_pairs`), and returns a `Ratio` over pairs
and metrics that are Ratios. A pair is there if both answers have a token of weight: if not, it has weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fstep.loss.pairs import Pairs, Scored, check_positive, compared, reward_metrics, total
from fstep.ratio import Ratio


def dpo_loss(ratios: Ratio, pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Scored:
    """Return the loss of Direct Preference Optimization (arXiv 2305.18290), and metrics.

    ``-(1 - s) log sigmoid(z) - s log sigmoid(-z)`` with ``z = beta * (R_chosen - R_rejected)``, where R is the sum of
    ``log pi - log ref`` over the tokens of an answer. With ``label_smoothing`` s it is conservative DPO: labels are taken
    to be wrong with probability s. ``ratios`` is a Ratio of [documents]: ``cp_sequence_sums(logp - ref_logp, mb, ...)``.

    The Ratio is over pairs. Metrics, with reward = beta R: ``accuracy`` (a tie is half; starts at 0.5, where pi is ref, and
    rises), ``reward_margin`` (starts at 0 and rises), ``reward_chosen``, ``reward_rejected`` (both start at 0; if the chosen
    one falls far, the model unlearns both: add `chosen_nll`). The loss starts at log 2.

    Raises ValueError for a ``beta`` that is not positive, a ``label_smoothing`` outside 0 to 0.5, sums that fit no pairs.

    >>> import torch, fstep
    >>> packed = fstep.pack_thd(fstep.make_docs([[1, 2, 3], [1, 4]], per_document={"pair": [0, 0], "chosen": [True, False]}))
    >>> logp, reference = torch.tensor([-1.0, -1.0, 0, -3.0, 0]), torch.tensor([-2.0, -1.0, 0, -2.0, 0])
    >>> ratios = fstep.cp_sequence_sums(logp - reference, packed, axis=fstep.Mesh().cp)
    >>> pairs = fstep.find_pairs(packed.per_document["pair"], packed.per_document["chosen"])
    >>> loss, metrics = fstep.dpo_loss(ratios, pairs, beta=0.5)  # z = 0.5 * (1 - (-1))
    >>> loss.mean(), metrics["reward_margin"].mean(), metrics["accuracy"].mean()
    (tensor(0.3133), tensor(1.), tensor(1.))
    """
    check_positive("dpo_loss", beta=beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"dpo_loss: label_smoothing is {label_smoothing}; pass a probability of at most 0.5")
    chosen, rejected, weights = compared("dpo_loss", ratios, pairs)
    z = beta * (chosen.num - rejected.num)
    terms = -(1 - label_smoothing) * logsigmoid(z)
    if label_smoothing:  # 0 * log sigmoid(-z) is NaN for an infinite z, of a rejected answer that cannot be
        terms = terms - label_smoothing * logsigmoid(-z)
    return total(terms, weights), reward_metrics(beta * chosen.num, beta * rejected.num, weights)


def ipo_loss(ratios: Ratio, pairs: Pairs, *, beta: float, average: bool = False) -> Scored:
    """Return the loss of Identity Preference Optimization (arXiv 2310.12036), and metrics.

    ``(R_chosen - R_rejected - 1 / (2 beta))^2`` with R as in `dpo_loss`, summed over the answer's tokens as in the paper
    (its beta is called tau), or with ``average=True`` their mean, which other libraries use and which asks for another
    beta. Where DPO pushes margins without end, this one has an aim: ``R_chosen - R_rejected = 1 / (2 beta)``.

    The Ratio is over pairs; metrics are those of `dpo_loss`: ``reward_margin`` goes to 0.5. The loss starts at
    ``1 / (4 beta^2)``. Raises ValueError as `dpo_loss`.

    >>> import torch, fstep
    >>> ratios = fstep.Ratio(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 2.0]))
    >>> pairs = fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([True, False]))
    >>> fstep.ipo_loss(ratios, pairs, beta=0.5)[0]  # (3 - 1)^2
    Ratio(num=tensor(4.), den=tensor(1.))
    """
    check_positive("ipo_loss", beta=beta)
    chosen, rejected, weights = compared("ipo_loss", ratios, pairs)
    c, r = (chosen.mean(), rejected.mean()) if average else (chosen.num, rejected.num)
    return total((c - r - 1 / (2 * beta)).square(), weights), reward_metrics(beta * c, beta * r, weights)


def simpo_loss(logprobs: Ratio, pairs: Pairs, *, beta: float, margin: float) -> Scored:
    """Return the loss of Simple Preference Optimization (arXiv 2405.14734), which has no reference model, and metrics.

    ``-log sigmoid(beta * (m_chosen - m_rejected) - margin)``, m the mean log probability of an answer's tokens; ``margin``
    is the paper's gamma. ``logprobs`` is a Ratio of [documents]: ``cp_sequence_sums(logp, mb, ...)``.

    The Ratio is over pairs. Metrics are those of `dpo_loss` with reward = beta m, below 0 from the start.
    Raises ValueError as `dpo_loss`.

    >>> import torch, fstep
    >>> logprobs = fstep.Ratio(torch.tensor([-3.0, -4.0]), torch.tensor([3.0, 2.0]))
    >>> pairs = fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([True, False]))
    >>> fstep.simpo_loss(logprobs, pairs, beta=2.0, margin=1.0)[0].mean()  # -log sigmoid(2 * (-1 - (-2)) - 1)
    tensor(0.3133)
    """
    check_positive("simpo_loss", beta=beta)
    chosen, rejected, weights = compared("simpo_loss", logprobs, pairs)
    c, r = beta * chosen.mean(), beta * rejected.mean()
    return total(-logsigmoid(c - r - margin), weights), reward_metrics(c, r, weights)


def orpo_loss(logprobs: Ratio, pairs: Pairs, *, beta: float) -> Scored:
    """Return the loss of Odds Ratio Preference Optimization (arXiv 2403.07691), fine-tuning in one go, and metrics.

    ``-m_chosen - beta * log sigmoid(log odds(m_chosen) - log odds(m_rejected))`` with m as in `simpo_loss` and
    ``log odds(m) = m - log(1 - exp(m))``; beta is the paper's lambda. It needs no reference model.

    The Ratio is over pairs. Metrics: ``nll`` (-m_chosen: falls), ``log_odds`` (the argument of the sigmoid: rises), and
    those of `dpo_loss` with reward = beta m. Raises ValueError as `dpo_loss`.

    >>> import torch, fstep
    >>> logprobs = fstep.Ratio(torch.tensor([0.5, 0.25]).log(), torch.tensor([1.0, 1.0]))
    >>> pairs = fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([True, False]))
    >>> loss, metrics = fstep.orpo_loss(logprobs, pairs, beta=1.0)
    >>> loss.mean(), metrics["log_odds"].mean().exp()  # odds 1 to 1 against 1 to 3; log 2 - log(3 / 4)
    (tensor(0.9808), tensor(3.))
    """
    check_positive("orpo_loss", beta=beta)
    chosen, rejected, weights = compared("orpo_loss", logprobs, pairs)
    c, r = chosen.mean(), rejected.mean()
    z = _log_odds(c) - _log_odds(r)
    metrics = {
        "nll": total(-c, weights).detach(),
        "log_odds": total(z, weights).detach(),
        **reward_metrics(beta * c, beta * r, weights),
    }
    return total(-c - beta * logsigmoid(z), weights), metrics


def _log_odds(m: Tensor) -> Tensor:
    # A token that is certain has infinite odds, and a gradient that is 0 times infinity: it is taken to be nearly so.
    m = m.clamp(max=-torch.finfo(m.dtype).tiny)
    # 1 - exp(m), on either side of m = -log 2 in the way that keeps its digits.
    near = m > -0.6931
    rest = torch.where(near, (-torch.expm1(torch.where(near, m, -1))).log(), torch.log1p(-torch.where(near, -1, m).exp()))
    return m - rest


def chosen_nll(logprobs: Ratio, pairs: Pairs) -> Ratio:
    """Return the negative log likelihood of the chosen answers, to be added to a preference loss (arXiv 2404.19733).

    ``-m_chosen``, the mean over an answer's tokens as in `simpo_loss`, summed over pairs; the weight is that of the pairs,
    so that it adds to another loss of the same pairs: ``Ratio(dpo.num + alpha * nll.num, dpo.den)``. Report it as a metric,
    ``nll.detach()``: it should not rise.

    >>> import torch, fstep
    >>> logprobs = fstep.Ratio(torch.tensor([-3.0, -4.0]), torch.tensor([3.0, 2.0]))
    >>> fstep.chosen_nll(logprobs, fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([True, False])))
    Ratio(num=tensor(1.), den=tensor(1.))
    """
    chosen, _, weights = compared("chosen_nll", logprobs, pairs)
    return total(-chosen.mean(), weights)
