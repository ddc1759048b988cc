"""The value function of PPO: what it is trained on, and the advantages that come of it.

    token        a     b     c    (of another)       delta[t] = r[t] + gamma V[t+1] - V[t]
    weights      1     0     1                       A[t]     = delta[t] + gamma lam A[t+1]
    next         c     -     end

The next token is the next one of the document that carries weight: what a tool wrote into an answer is no action, and is
stepped over. Where an answer was cut off for its length, the value of what would have come is its ``bootstrap``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.batch.batch import Docs
from fstep.batch.packed import Packed
from fstep.loss.documents import check_documents, check_tokens, check_whole, document_index, next_counted
from fstep.loss.weigh import counted, over
from fstep.ratio import Ratio


def gae(
    rewards: Tensor,
    values: Tensor,
    batch: Docs | Packed,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns of every token that carries weight, 0 elsewhere: [tokens] and [tokens].

    ``A[t] = delta[t] + gamma lam A[t+1]`` with ``delta[t] = r[t] + gamma V[t+1] - V[t]``, within each document; t+1 is the
    next token that carries weight. After the last one there is ``bootstrap`` (a number a document: 0 where the answer ended,
    its value where it was cut off; default 0) and no further A. Returns are ``A + V``. (arXiv:1506.02438)

    ``batch`` is a `Docs` or a whole packed row, ``rewards[t]`` and ``values[t]`` are about predicting token t, as targets
    are. A reward for the whole answer is ``spread_documents(rewards, batch, last=True)``; what stands where no weight is is
    dropped. Computed in log2(tokens) passes over all tokens, not token by token, in float32 at least.

    Raises ValueError for shapes that do not fit, a shard, or ``gamma`` or ``lam`` outside [0, 1].

    >>> import torch, fstep
    >>> docs = fstep.make_docs([[5, 6, 7], [8, 9]])
    >>> rewards = fstep.spread_documents(torch.tensor([1.0, 2.0]), docs, last=True)
    >>> values = torch.tensor([torch.nan, 0.5, 0.25, torch.nan, 1.0])
    >>> fstep.gae(rewards, values, docs, gamma=1.0, lam=0.5)
    (tensor([0.0000, 0.1250, 0.7500, 0.0000, 1.0000]), tensor([0.0000, 0.6250, 1.0000, 0.0000, 2.0000]))
    """
    function = "gae"
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{function}: {name} is {x}; pass a number from 0 to 1")
    check_whole(function, batch)
    check_tokens(function, "rewards", rewards, batch)
    check_tokens(function, "values", values, batch)
    mask, _, (rewards, values) = counted(function, batch.weights, rewards=rewards, values=values)
    index, rows = document_index(function, batch)
    tokens = len(mask)
    after = next_counted(mask, index)
    ahead = torch.cat([values, values.new_zeros(1)])[after]
    if bootstrap is not None:
        check_documents(function, "bootstrap", bootstrap, batch)
        ends = torch.cat([bootstrap, bootstrap.new_zeros(rows - len(bootstrap))]).to(values.dtype)
        ahead = torch.where(after == tokens, ends[index], ahead)
    delta = torch.where(mask, rewards + gamma * ahead - values, 0)

    # Each pass reaches twice as far: A holds the sum of the first k deltas ahead, `factor` is (gamma lam)^k, `to` is k on.
    # Place `tokens` stands for the end, where nothing is added.
    total = torch.cat([delta, delta.new_zeros(1)])
    to = torch.cat([after, after.new_full((1,), tokens)])
    factor = gamma * lam
    for _ in range(max(tokens - 1, 0).bit_length()):
        total = total + factor * total[to]
        to = to[to]
        factor = factor * factor
    advantages = torch.where(mask, total[:-1], 0)
    return advantages, advantages + values


def value_loss(
    values: Tensor,
    returns: Tensor,
    weights: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    counts: Tensor | None = None,
) -> tuple[Ratio, dict[str, Ratio]]:
    """Return half the squared error of a value function as a `Ratio`, and metrics. All arguments are [tokens].

    ``num = sum(weight * (V - R)^2 / 2)``. With ``clip`` = e and ``old_values``, PPO's pessimistic form (in its code, not its
    paper; arXiv:2005.12729 looks at what it does)::

        max((V - R)^2, (old + clip(V - old, -e, e) - R)^2) / 2

    A token whose value has moved by more than e, in the direction that helps, has gradient exactly 0; on the bound it still
    has its gradient. Returns and old values are constants.

    Metrics, by weight: ``value_clip`` (tokens without gradient; small), ``value_error`` (mean of ``(V - R)^2``), ``returns``
    and ``returns_square`` (means). ``1 - value_error / (returns_square - returns^2)`` is the explained variance: from about
    0 towards 1; below 0 the values are worse than one number for all.

    Raises ValueError for shapes that differ, or one of ``clip`` and ``old_values`` without the other.

    >>> import torch, fstep
    >>> values, returns = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([2.0, 2.5, 0.0])
    >>> weights = torch.tensor([1.0, 1.0, 0.0])
    >>> fstep.value_loss(values, returns, weights)[0]  # (1 + 0.25) / 2
    Ratio(num=tensor(0.6250), den=tensor(2.))
    """
    function = "value_loss"
    if (clip is None) != (old_values is None):
        raise ValueError(f"{function}: of clip and old_values only one is given; pass both, or neither")
    if clip is not None and not clip > 0:
        raise ValueError(f"{function}: clip is {clip}; pass a positive number, or None")
    _, weights, (values, returns, old) = counted(
        function, weights, optional=("old_values",), values=values, returns=returns, old_values=old_values
    )
    returns, old = returns.detach(), old.detach()
    error = values - returns
    cut = torch.zeros_like(weights, dtype=torch.bool)
    if clip is not None:
        # Not old + clamp(values - old): rounded, that is not the value itself, and cuts tokens that have hardly moved.
        near = values.detach().clamp(old - clip, old + clip) - returns
        cut = near.abs() > error.detach().abs()
        error = torch.where(cut, near, error)
    loss = over(function, error.square() / 2, weights, counts)
    plain = (values - returns).detach().square()
    measured = {"value_clip": cut, "value_error": plain, "returns": returns, "returns_square": returns.square()}
    return loss, {name: over(function, x.to(weights.dtype), weights.detach(), None) for name, x in measured.items()}
