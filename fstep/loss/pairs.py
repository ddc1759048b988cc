"""Which documents of a microbatch are compared: a chosen one and a rejected one.

    document     0  1  2  3          chosen     0  3        Pairs: rows of the [documents] tensors that a loss is given
    pair         7  7  2  2    ->    rejected   1  2        (the pair of the lower number first)
    chosen       1  0  0  1

A pair is data: two entries of ``per_document``, which stay with the documents however the batch is cut.
``split_microbatches(..., together=docs.per_document["pair"])`` keeps the two in one microbatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fstep.ratio import Ratio
from fstep.trace import in_transform
from fstep.tree import check_type, pytree

Scored = tuple[Ratio, dict[str, Ratio]]  # a loss, and metrics


@pytree
class Pairs:
    """Rows of the chosen and the rejected documents, int64 [pairs], and how much each pair counts, [pairs].

    >>> import torch, fstep
    >>> pairs = fstep.find_pairs(torch.tensor([7, 7]), torch.tensor([False, True]))
    >>> isinstance(pairs, fstep.Pairs), pairs.chosen, pairs.rejected
    (True, tensor([1]), tensor([0]))
    """

    chosen: Tensor
    rejected: Tensor
    weights: Tensor


def find_pairs(pair: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Pairs:
    """Return which documents of a microbatch belong together, from one entry a document.

    ``pair`` [documents] numbers the pairs, two documents each; ``chosen`` [documents] is true (or not 0) for the better
    one; ``weights`` [documents] says how much a pair counts (default 1; that of its chosen document is taken). Nothing
    waits for the device.

    Raises ValueError for shapes that differ, an odd number of documents and, on the CPU, a pair that is not one chosen and
    one rejected document; on a GPU such a pair's weight is NaN, so that the step is not finite and is skipped.

    >>> import torch, fstep
    >>> fstep.find_pairs(torch.tensor([7, 7, 2, 2]), torch.tensor([True, False, False, True]))
    Pairs(chosen=tensor([3, 0]), rejected=tensor([2, 1]), weights=tensor([1., 1.]))
    """
    for name, x in (("pair", pair), ("chosen", chosen)):
        check_type("find_pairs", name, x, Tensor, f"one entry a document, e.g. mb.per_document[{name!r}]")
    if pair.dim() != 1 or chosen.shape != pair.shape or (weights is not None and weights.shape != pair.shape):
        more = "" if weights is None else f" and weights {tuple(weights.shape)}"
        raise ValueError(
            f"find_pairs: pair is {tuple(pair.shape)}, chosen {tuple(chosen.shape)}{more}; give one entry a document"
        )
    fix = 'keep pairs in one part, with split_microbatches(..., together=docs.per_document["pair"])'
    if len(pair) % 2:
        raise ValueError(f"find_pairs: {len(pair)} documents are no pairs of two; {fix}")
    better = chosen != 0
    # Stable, by the less important key first: pairs by their number, the chosen document in front.
    order = (~better).to(torch.uint8).argsort(stable=True)
    order = order[pair[order].argsort(stable=True)]
    first, second = order[0::2], order[1::2]
    good = (pair[first] == pair[second]) & better[first] & ~better[second]
    if pair.device.type == "cpu" and not in_transform() and not good.all():
        number = int(pair[first[~good][0]])
        flags = better[pair == number].tolist()
        raise ValueError(
            f"find_pairs: pair {number} has {len(flags)} documents here, chosen={flags}; it needs one chosen and one "
            f"rejected; {fix}"
        )
    each = torch.ones_like(first, dtype=torch.float32) if weights is None else weights[first]
    return Pairs(first, second, torch.where(good, each, torch.nan))


def compared(function: str, of: Ratio, pairs: Pairs) -> tuple[Ratio, Ratio, Tensor]:
    """Return what chosen and rejected documents have, and the pairs' weights; a pair without weight has 0 of 0."""
    check_type(function, "the first argument", of, Ratio, "what cp_sequence_sums returns")
    check_type(function, "pairs", pairs, Pairs, "what find_pairs returns")
    if of.num.dim() != 1 or of.den.shape != of.num.shape:
        raise ValueError(
            f"{function}: the first argument is a Ratio of {tuple(of.num.shape)} and {tuple(of.den.shape)}; pass sums of "
            "[documents], as cp_sequence_sums returns"
        )
    wide = torch.promote_types(of.num.dtype, torch.float32)
    both = (of.den[pairs.chosen] != 0) & (of.den[pairs.rejected] != 0)
    weights = torch.where(both, pairs.weights.to(wide), 0)

    def take(rows: Tensor) -> Ratio:
        # Before anything is computed: the gradient of inf * 0 is NaN too.
        return Ratio(*(torch.where(weights != 0, x[rows].to(wide), 0) for x in (of.num, of.den)))

    return take(pairs.chosen), take(pairs.rejected), weights


def total(terms: Tensor, weights: Tensor) -> Ratio:
    """Add up one finite term for each pair (or document); what has no weight was replaced before it was computed with."""
    return Ratio((terms * weights).sum(), weights.sum())


def reward_metrics(chosen: Tensor, rejected: Tensor, weights: Tensor) -> dict[str, Ratio]:
    """Return the rewards of both sides, their difference, and how often the chosen one's is higher; a tie is half."""
    margin = chosen - rejected
    terms = {
        "accuracy": (margin > 0) + 0.5 * (margin == 0),
        "reward_margin": margin,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: total(x.to(weights.dtype), weights).detach() for name, x in terms.items()}


def check_positive(function: str, **numbers: float) -> None:
    """Refuse a coefficient that is not a positive number."""
    for name, x in numbers.items():
        if isinstance(x, Tensor) or not x > 0:
            raise ValueError(f"{function}: {name} is {x}; pass a positive number")
