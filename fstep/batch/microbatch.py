"""`split_microbatches` cuts a batch of documents into parts of about the same number of tokens.

    documents   5 3 3 2 2 1      max_tokens=8   ->   5 3 | 3 2 2 1

What is computed on each part adds up: the loss is a `Ratio`, so any split gives the same loss and gradients. The same goes
for `divide_documents`, which gives each rank its part of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def divide_documents(batch: Docs, *, axis: Axis) -> Docs:
    """Return this rank's documents of ``batch``, with about as many tokens as every other rank's of ``axis``.

    Input: replicated over ``axis``, so that the documents of a step are the same for every mesh; output: a shard of it.
    Every rank makes the same plan, and nothing is communicated. With fewer documents than ranks some have none: they take
    part in the step with weight 0.

    >>> import fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3])
    >>> fstep.simulate(lambda mesh: fstep.divide_documents(docs, axis=mesh.dp).lengths.tolist(), dp=2)
    [[5], [3, 3]]
    """
    check_type("divide_documents", "batch", batch, Docs, "what make_docs returns")
    check_type("divide_documents", "axis", axis, Axis, "an axis of the mesh, e.g. mesh.dp")
    if axis.size == 1:
        return batch
    return select_documents(batch, plan_balanced(batch.lengths, axis.size)[axis.rank])


def split_microbatches(
    batch: Docs,
    *,
    num: int | None = None,
    max_tokens: int | None = None,
    multiple_of: int = 1,
    axis: Axis = Axis("dp"),  # noqa: B008 -- immutable
) -> tuple[Docs, ...]:
    """Cut ``batch`` into ``num`` microbatches, or into as few as hold at most ``max_tokens`` tokens each.

    Documents are spread so that token counts are about equal. Within a part they keep their order, and ``index`` tells
    which document is which: `join_documents` puts the batch together again. ``multiple_of`` is the one that `pack_thd`
    will be called with, so that padding counts towards the budget. With ``num`` larger than the number of documents some
    parts are empty; packed, they carry weight 0.

    With an ``axis`` of several ranks ``batch`` is first divided, as by `divide_documents`, and each rank gets the
    microbatches of its own documents, the same number of them on every rank: some may be empty. Input: replicated over
    ``axis``; output: a shard of it. Nothing is communicated.

    Raises ValueError if a document is longer than ``max_tokens``, or unless exactly one of ``num``, ``max_tokens`` is given.

    >>> import fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3, [4] * 2, [5] * 2, [6]])
    >>> [part.lengths.tolist() for part in fstep.split_microbatches(docs, max_tokens=8)]
    [[5, 2, 1], [3, 3, 2]]
    >>> cut = lambda mesh: fstep.split_microbatches(docs, max_tokens=5, axis=mesh.dp)
    >>> [[part.lengths.tolist() for part in parts] for parts in fstep.simulate(cut, dp=2)]
    [[[5], [2, 1]], [[3, 2], [3]]]
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
    lengths = [(n + multiple_of - 1) // multiple_of * multiple_of for n in batch.lengths.tolist()]
    if max_tokens is not None and lengths and max(lengths) > max_tokens:
        longest = lengths.index(max(lengths))
        raise ValueError(
            f"split_microbatches: document {int(batch.index[longest])} needs {max(lengths)} tokens (with multiple_of="
            f"{multiple_of}) and max_tokens is {max_tokens}; raise max_tokens or cut the document"
        )
    shares = (tuple(range(len(lengths))),) if axis.size == 1 else plan_balanced(batch.lengths, axis.size)

    def plan(share: Sequence[int]) -> Bins:
        mine = [lengths[i] for i in share]
        bins = plan_balanced(mine, num) if num is not None else _fewest_balanced(mine, max_tokens or 1)
        return tuple(tuple(share[i] for i in b) for b in bins)

    # Every rank plans for all, so that all know how many microbatches the one with the most has.
    plans = [plan(share) for share in shares]
    own = plans[axis.rank]
    own += ((),) * (max(map(len, plans)) - len(own))
    return tuple(select_documents(batch, b) for b in own)
