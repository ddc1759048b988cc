"""A `Ratio` is a sum and its weight, kept apart until the one place that divides.

microbatch 0:  Ratio(12.0, 4)   mean 3.0
microbatch 1:  Ratio( 2.0, 1)   mean 2.0        mean of means  2.5   (wrong)
together:      Ratio(14.0, 5)   mean 2.8        sum over sum   2.8   (what one big batch gives)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.tree import pytree


@pytree
class Ratio:
    """An unreduced sum ``num`` and its weight ``den``; ratios add, and `mean` divides once at the end.

    Both are 0-d tensors (on the way to a loss, tensors with an entry for each document). A loss, a metric, a count of
    clipped tokens over a count of tokens: each is a Ratio, so that it adds up over microbatches and over ranks to what one
    large batch would have given.

    >>> import torch, fstep
    >>> a = fstep.Ratio(torch.tensor(12.0), torch.tensor(4.0))
    >>> b = fstep.Ratio(torch.tensor(2.0), torch.tensor(1.0))
    >>> (a + b).mean()
    tensor(2.8000)
    >>> fstep.Ratio(torch.tensor(0.0), torch.tensor(0.0)).mean()
    tensor(0.)
    """

    num: Tensor
    den: Tensor

    def __add__(self, other: Ratio) -> Ratio:
        if not isinstance(other, Ratio):
            return NotImplemented
        return Ratio(self.num + other.num, self.den + other.den)

    def __radd__(self, other: object) -> Ratio:
        # sum() starts from the integer 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> Tensor:
        """Divide; a ratio of no weight has mean 0."""
        some = self.den != 0
        return torch.where(some, self.num / torch.where(some, self.den, 1), 0)

    def detach(self) -> Ratio:
        """Return the same value, cut off from any graph."""
        return Ratio(self.num.detach(), self.den.detach())
