"""`weigh`: values of tokens, their weights, and what they are divided by, made a `Ratio`.

    values   0.7  nan  0.2 |  1.0  0.4  0.1        one number a token, garbage where nothing counts
    weights   1    0    1  |   1    1    1         num = sum of weights * values
    counts    1    0    1  |   1    1    1         den of a mean over tokens                  5
             1/2   0   1/2 |  1/3  1/3  1/3        den of a mean over documents               2

Whatever a loss is divided by is a number a token and comes with the batch. So it adds up over microbatches and ranks, and
everyone knows it before anything is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ratio import Ratio
from fstep.tree import check_type


def counted(
    function: str, weights: Tensor, *, optional: tuple[str, ...] = (), **values: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return where tokens count, the weights, and the values with 0 where they do not, in float32 at least.

    Dropped before anything is computed from them: the gradient of ``where(mask, exp(x), 0)`` is NaN for an infinite x, as
    that of ``exp(x) * 0`` is. An ``optional`` value that is None is 1 everywhere, as a factor that was not given; another
    that is None is a mistake, such as a target looked up by a wrong name.
    """
    check_type(function, "weights", weights, Tensor, "a tensor of weights")
    wide = torch.promote_types(weights.dtype, torch.float32)
    for name, x in values.items():
        if x is None and name in optional:
            continue
        check_type(function, name, x, Tensor, "a tensor with one number a token")
        assert isinstance(x, Tensor)
        if x.shape != weights.shape:
            raise ValueError(
                f"{function}: {name} has shape {tuple(x.shape)}, weights {tuple(weights.shape)}; give one number a token"
            )
        wide = torch.promote_types(wide, x.dtype)
    mask = weights != 0
    kept = [torch.ones_like(mask, dtype=wide) if x is None else torch.where(mask, x, 0).to(wide) for x in values.values()]
    return mask, weights.to(wide), kept


def over(function: str, terms: Tensor, weights: Tensor, counts: Tensor | None) -> Ratio:
    """Add up terms that are finite where nothing counts, over the sum of ``counts``, or of the weights."""
    if counts is None:
        return Ratio((terms * weights).sum(), weights.sum())
    check_type(function, "counts", counts, Tensor, "a tensor of numbers that add up to the denominator, or None")
    if counts.shape != weights.shape:
        raise ValueError(
            f"{function}: counts has shape {tuple(counts.shape)}, weights {tuple(weights.shape)}; give one number a token"
        )
    return Ratio((terms * weights).sum(), counts.to(weights.dtype).sum())


def weigh(values: Tensor, weights: Tensor, *, counts: Tensor | None = None) -> Ratio:
    """Return ``sum(weights * values)`` over ``sum(counts)`` as a `Ratio`; ``counts`` are the weights unless given.

    All are [tokens]. A value of weight 0 is dropped, not multiplied by 0. Sums are at least float32. It is an entropy bonus
    or any other term that is a number a token: terms of one loss are added as ``num``, over the ``den`` of one of them.

    Raises ValueError if the shapes differ, TypeError for what is no tensor.

    >>> import torch, fstep
    >>> entropies, weights = torch.tensor([0.5, torch.nan, 1.5]), torch.tensor([1.0, 0.0, 1.0])
    >>> loss, entropy = fstep.Ratio(torch.tensor(3.0), torch.tensor(2.0)), fstep.weigh(entropies, weights)
    >>> fstep.Ratio(loss.num - 0.1 * entropy.num, loss.den).mean()
    tensor(1.4000)
    """
    _, weights, (values,) = counted("weigh", weights, values=values)
    return over("weigh", values, weights, counts)
