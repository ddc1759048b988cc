"""How far the tokens in hand are from the policy that learns: ratios of sequences, and factors that correct for it.

    generator  ->  old  ->  policy          generator   what drew the tokens: another engine, other kernels, older weights
        |           |         |             old         the trainer's score of them, before the first update
        +-----------+         |             policy      what is differentiated
          importance_weights  |
                    +---------+
                     clipped_loss, cispo_loss

Both are ratios ``exp(log_ratio)``. The right one is differentiated and clipped; the left one is a constant factor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fstep.batch.batch import Docs
from fstep.batch.packed import Packed
from fstep.loss.documents import document_sums, spread_documents
from fstep.loss.weigh import counted, over
from fstep.mesh.axis import Axis
from fstep.ratio import Ratio


def cp_sequence_log_ratio(
    log_ratio: Tensor,
    batch: Docs | Packed,
    *,
    mean: bool = True,
    axis: Axis = Axis("cp"),  # noqa: B008 -- immutable
) -> Tensor:
    """Return the log ratio of each token's document: the mean over its tokens that carry weight, or their sum. [tokens]

    ``s = (1/n) sum_t log_ratio[t]`` of the n tokens, at every token of the document: GSPO's ratio is ``exp(s)``
    (arXiv:2507.18071), the n-th root of the ratio of the answer's probabilities. ``mean=False`` gives the sum, the log of
    that ratio itself. A document that carries no weight has 0. Differentiable; values where nothing counts are dropped.

    If ``batch`` is a shard of `cp_shard`, ``axis`` is that axis, and one number a document is added up over it. Input and
    output: shards; the loss made of it is a partial sum, as losses of tokens are.

    Raises ValueError for another length, a shard without its axis or an axis without its shard.

    >>> import torch, fstep
    >>> docs = fstep.make_docs([[5, 6, 7], [8, 9]])
    >>> fstep.cp_sequence_log_ratio(torch.tensor([9.0, 0.2, 0.4, 9.0, -0.1]), docs)
    tensor([ 0.3000,  0.3000,  0.3000, -0.1000, -0.1000])
    """
    function = "cp_sequence_log_ratio"
    total = document_sums(function, "log_ratio", log_ratio, batch, axis)
    if mean:
        ones = torch.ones_like(log_ratio, dtype=total.dtype)
        total = total / document_sums(function, "log_ratio", ones, batch, axis).clamp(min=1)
    return spread_documents(total, batch)


def importance_weights(
    log_ratio: Tensor,
    weights: Tensor,
    *,
    low: float = 0.0,
    high: float = 2.0,
    outside: Literal["clip", "zero"] = "clip",
) -> tuple[Tensor, dict[str, Ratio]]:
    """Return constant factors for tokens that another policy drew: ``exp(log_ratio)`` kept in [low, high]. [tokens]

    ``log_ratio = old - generator``. What is outside is moved to the nearest bound (``"clip"``) or its token left out
    (``"zero"``); bounds belong to the inside. Pass the result as ``importance`` to a loss:

    - TIS, truncation of each token: the default (Yao et al. 2025, "Your efficient RL framework secretly brings you
      off-policy RL training"; before it IMPALA, arXiv:1802.01561).
    - IcePop: ``low=0.5, high=5, outside="zero"`` (Ring-1T, arXiv:2510.18855).
    - of sequences: pass ``cp_sequence_log_ratio(old - generator, batch, mean=False)``, with either ``outside``.

    No gradient passes through. Metrics: ``importance`` (mean factor; near 1), ``importance_low`` and ``importance_high``
    (the weight outside; under a few percent, or the generator is not the policy that it is taken for).

    Raises ValueError unless ``0 <= low <= high``, or for another ``outside``.

    >>> import torch, fstep
    >>> log_ratio, weights = torch.tensor([0.1, 1.5, -2.0]).log1p().nan_to_num(torch.nan), torch.tensor([1.0, 1.0, 0.0])
    >>> factors, metrics = fstep.importance_weights(log_ratio, weights)
    >>> factors, metrics["importance_high"].mean()
    (tensor([1.1000, 2.0000, 1.0000]), tensor(0.5000))
    >>> fstep.importance_weights(log_ratio, weights, low=0.5, high=2.0, outside="zero")[0]
    tensor([1.1000, 0.0000, 1.0000])
    """
    function = "importance_weights"
    if not 0 <= low <= high:
        raise ValueError(f"{function}: low is {low} and high is {high}; pass 0 <= low <= high, bounds of the ratio itself")
    if outside not in ("clip", "zero"):
        raise ValueError(f'{function}: outside is {outside!r}; pass "clip" or "zero"')
    _, weights, (log_ratio,) = counted(function, weights, log_ratio=log_ratio)
    weights, ratio = weights.detach(), log_ratio.detach().exp()
    below, above = ratio < low, ratio > high
    factor = ratio.clamp(low, high) if outside == "clip" else ratio.masked_fill(below | above, 0)
    metrics = {"importance": factor, "importance_low": below, "importance_high": above}
    return factor, {name: over(function, x.to(weights.dtype), weights, None) for name, x in metrics.items()}


def ratio_extremes(log_ratio: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest ``exp(log_ratio)`` of the tokens that carry weight, or 1 and 1 if none does.

    An extreme is no `Ratio`: it does not add up. Take it of whole batches, where scores are at hand; over microbatches it
    is the minimum and maximum of theirs, over ranks ``-pmax(-smallest)`` and ``pmax(largest)``. Detached, 0-d.

    >>> import torch, fstep
    >>> fstep.ratio_extremes(torch.tensor([0.5, 2.0, 9.0]).log(), torch.tensor([1.0, 1.0, 0.0]))
    (tensor(0.5000), tensor(2.))
    """
    _, _, (log_ratio,) = counted("ratio_extremes", weights, log_ratio=log_ratio)
    kept = torch.cat([log_ratio.detach().flatten(), log_ratio.new_zeros(1)])
    some = torch.cat([(weights != 0).flatten(), (weights == 0).all()[None]])
    return kept.masked_fill(~some, torch.inf).amin().exp(), kept.masked_fill(~some, -torch.inf).amax().exp()
