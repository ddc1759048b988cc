"""`split_microbatches` cuts a batch of documents into parts of about the same number of tokens.

    documents   5 3 3 2 2 1      max_tokens=8   ->   5 3 | 3 2 2 1

What is computed on each part adds up: the loss is a `Ratio`, so any split gives the same loss and gradients. The same goes
for `divide_documents`, which gives each rank its part of a batch.

A loss that compares documents (a chosen answer and a rejected one) needs them in one part: ``together`` gives documents
that stay together one number, and such a group is then spread as one document would be.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fstep.batch.batch import Docs, select_documents
from fstep.batch.plan import Bins, plan_balanced, plan_first_fit
from fstep.mesh.axis import Axis
from fstep.tree import check_type


def _fewest_balanced(lengths: list[int], max_tokens: int) -> Bins:
    """Use as few bins as first-fit decreasing needs, evened out where that can be done."""
    bins = plan_first_fit(lengths, max_tokens)
    try:
        return plan_balanced(lengths, max(len(bins), 1), lengths=lengths, capacity=max_tokens)
    except ValueError:  # so full that evening out does not fit
        return bins


def _groups(function: str, batch: Docs, together: Tensor | None) -> Bins:
    """List the documents that stay together; without ``together`` each is on its own."""
    if together is None:
        return tuple((i,) for i in range(len(batch.lengths)))
    check_type(function, "together", together, Tensor, 'a number for each document, e.g. docs.per_document["pair"]')
    if together.shape != batch.lengths.shape or together.is_floating_point():
        raise ValueError(
            f"{function}: together is {together.dtype} {tuple(together.shape)} for {len(batch.lengths)} documents; give "
            'each a whole number, the same for those that stay together, e.g. docs.per_document["pair"]'
        )
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(together.tolist()):
        groups.setdefault(number, []).append(i)
    return tuple(tuple(g) for g in groups.values())


def _sums(groups: Bins, lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[i] for i in g) for g in groups]


def _documents(groups: Bins, numbers: Sequence[int]) -> list[int]:
    return sorted(i for n in numbers for i in groups[n])


def divide_documents(batch: Docs, *, axis: Axis, together: Tensor | None = None) -> Docs:
    """Return this rank's documents of ``batch``, with about as many tokens as every other rank's of ``axis``.

    Input: replicated over ``axis``, so that the documents of a step are the same for every mesh; output: a shard of it.
    Every rank makes the same plan, and nothing is communicated. With fewer documents than ranks some have none: they take
    part in the step with weight 0. Documents with one number in ``together`` [documents] go to one rank.

    >>> import fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3])
    >>> fstep.simulate(lambda mesh: fstep.divide_documents(docs, axis=mesh.dp).lengths.tolist(), dp=2)
    [[5], [3, 3]]
    """
    check_type("divide_documents", "batch", batch, Docs, "what make_docs returns")
    check_type("divide_documents", "axis", axis, Axis, "an axis of the mesh, e.g. mesh.dp")
    groups = _groups("divide_documents", batch, together)
    if axis.size == 1:
        return batch
    lengths = _sums(groups, batch.lengths.tolist())
    return select_documents(batch, _documents(groups, plan_balanced(lengths, axis.size)[axis.rank]))


def split_microbatches(
    batch: Docs,
    *,
    num: int | None = None,
    max_tokens: int | None = None,
    multiple_of: int = 1,
    axis: Axis = Axis("dp"),  # noqa: B008 -- immutable
    together: Tensor | None = None,
) -> tuple[Docs, ...]:
    """Cut ``batch`` into ``num`` microbatches, or into as few as hold at most ``max_tokens`` tokens each.

    Documents are spread so that token counts are about equal. Within a part they keep their order, and ``index`` tells
    which document is which: `join_documents` puts the batch together again. ``multiple_of`` is the one that `pack_thd`
    will be called with, so that padding counts towards the budget. With ``num`` larger than the number of documents some
    parts are empty; packed, they carry weight 0.

    With an ``axis`` of several ranks ``batch`` is first divided, as by `divide_documents`, and each rank gets the
    microbatches of its own documents, the same number of them on every rank: some may be empty. Input: replicated over
    ``axis``; output: a shard of it. Nothing is communicated.

    ``together`` [documents] gives the same whole number to documents that have to be in one part: the chosen and the
    rejected answer of a pair, for a loss that compares them.

    Raises ValueError if a document, or what stays together, is longer than ``max_tokens``, unless exactly one of ``num``,
    ``max_tokens`` is given, and for a ``together`` that does not fit.

    >>> import torch, fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3, [4] * 2, [5] * 2, [6]])
    >>> [part.lengths.tolist() for part in fstep.split_microbatches(docs, max_tokens=8)]
    [[5, 2, 1], [3, 3, 2]]
    >>> cut = lambda mesh: fstep.split_microbatches(docs, max_tokens=5, axis=mesh.dp)
    >>> [[part.lengths.tolist() for part in parts] for parts in fstep.simulate(cut, dp=2)]
    [[[5], [2, 1]], [[3, 2], [3]]]
    >>> pairs = torch.tensor([0, 0, 1, 1, 2, 2])
    >>> [part.lengths.tolist() for part in fstep.split_microbatches(docs, max_tokens=8, together=pairs)]
    [[5, 3], [3, 2, 2, 1]]
    """
    check_type("split_microbatches", "batch", batch, Docs, "what make_docs returns")
    check_type("split_microbatches", "axis", axis, Axis, "an axis of the mesh, e.g. mesh.dp")
    for name, number in (("num", num), ("max_tokens", max_tokens), ("multiple_of", multiple_of)):
        check_type("split_microbatches", name, number, (int, type(None)), "a whole number")
    if (num is None) == (max_tokens is None):
        raise ValueError(f"split_microbatches: num={num} and max_tokens={max_tokens}; pass exactly one of them")
    if multiple_of < 1:
        raise ValueError(f"split_microbatches: multiple_of is {multiple_of}; pass 1 or more")
    if num is not None and num < 1:
        raise ValueError(f"split_microbatches: num is {num}; pass 1 or more")
    groups = _groups("split_microbatches", batch, together)
    real = batch.lengths.tolist()
    lengths = _sums(groups, [(n + multiple_of - 1) // multiple_of * multiple_of for n in real])
    if max_tokens is not None and lengths and max(lengths) > max_tokens:
        longest = [int(batch.index[i]) for i in groups[lengths.index(max(lengths))]]
        one = len(longest) == 1
        what = f"document {longest[0]} needs" if one else f"documents {longest}, which stay together, need"
        raise ValueError(
            f"split_microbatches: {what} {max(lengths)} tokens (with multiple_of="
            f"{multiple_of}) and max_tokens is {max_tokens}; raise max_tokens or cut {'the document' if one else 'them'}"
        )
    shares = (tuple(range(len(lengths))),) if axis.size == 1 else plan_balanced(_sums(groups, real), axis.size)

    def plan(share: Sequence[int]) -> Bins:
        mine = [lengths[i] for i in share]
        bins = plan_balanced(mine, num) if num is not None else _fewest_balanced(mine, max_tokens or 1)
        return tuple(tuple(share[i] for i in b) for b in bins)

    # Every rank plans for all, so that all know how many microbatches the one with the most has.
    plans = [plan(share) for share in shares]
    own = plans[axis.rank]
    own += ((),) * (max(map(len, plans)) - len(own))
    return tuple(select_documents(batch, _documents(groups, b)) for b in own)
