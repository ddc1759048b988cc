"""`split_microbatches` cuts a batch of documents into parts of about the same number of tokens.

    documents   5 3 3 2 2 1      max_tokens=8   ->   5 3 | 3 2 2 1

What is computed on each part adds up: the loss is a `Ratio`, so any split gives the same loss and gradients. The same goes
for `divide_documents`, which gives each rank its part of a batch.
"""

from __future__ import annotations

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
    batch: Docs, *, num: int | None = None, max_tokens: int | None = None, multiple_of: int = 1
) -> tuple[Docs, ...]:
    """Cut ``batch`` into ``num`` microbatches, or into as few as hold at most ``max_tokens`` tokens each.

    Documents are spread so that token counts are about equal. Within a part they keep their order, and ``index`` tells
    which document is which: `join_documents` puts the batch together again. ``multiple_of`` is the one that `pack_thd`
    will be called with, so that padding counts towards the budget. With ``num`` larger than the number of documents some
    parts are empty; packed, they carry weight 0.

    Raises ValueError if a document is longer than ``max_tokens``, or unless exactly one of ``num``, ``max_tokens`` is given.

    >>> import fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3, [4] * 2, [5] * 2, [6]])
    >>> [part.lengths.tolist() for part in fstep.split_microbatches(docs, max_tokens=8)]
    [[5, 2, 1], [3, 3, 2]]
    """
    check_type("split_microbatches", "batch", batch, Docs, "what make_docs returns")
    if (num is None) == (max_tokens is None):
        raise ValueError(f"split_microbatches: num={num} and max_tokens={max_tokens}; pass exactly one of them")
    if multiple_of < 1:
        raise ValueError(f"split_microbatches: multiple_of is {multiple_of}; pass 1 or more")
    lengths = [(n + multiple_of - 1) // multiple_of * multiple_of for n in batch.lengths.tolist()]
    if num is not None:
        if num < 1:
            raise ValueError(f"split_microbatches: num is {num}; pass 1 or more")
        bins = plan_balanced(lengths, num)
    else:
        assert max_tokens is not None
        if lengths and max(lengths) > max_tokens:
            longest = lengths.index(max(lengths))
            raise ValueError(
                f"split_microbatches: document {int(batch.index[longest])} needs {max(lengths)} tokens (with multiple_of="
                f"{multiple_of}) and max_tokens is {max_tokens}; raise max_tokens or cut the document"
            )
        bins = _fewest_balanced(lengths, max_tokens)
    return tuple(select_documents(batch, b) for b in bins)
