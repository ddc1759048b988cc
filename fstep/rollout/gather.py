"""The documents of all ranks on every rank: each answered its own prompts, and a step takes one batch.

rank 0   docs 0 3   ─┐  padded to the longest rank's,
rank 1   docs 1 2   ─┴─ exchanged, cut to size again      docs 0 1 2 3 on both
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fstep.batch.batch import check_sizes, join_documents
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import all_gather
from fstep.tree import tree_leaves, tree_map

B = TypeVar("B")


@torch.no_grad()
def gather_documents(batch: B, *, axis: Axis) -> B:
    """Return the documents of all ranks of ``axis``, in the order of their ``index``: the inverse of `divide_documents`.

    Input: a shard, of any number of documents, none too; output: replicated, as `split_microbatches` takes a batch. Every
    rank's batch has the same fields, of the same dtypes; what is cut along "none" stays this rank's. Nothing is
    differentiated. Raises ValueError for a field of the wrong length.

    >>> import fstep
    >>> docs = fstep.make_docs([[1] * 5, [2] * 3, [3] * 3])
    >>> def f(mesh):
    ...     return fstep.gather_documents(fstep.divide_documents(docs, axis=mesh.dp), axis=mesh.dp).lengths.tolist()
    >>> fstep.simulate(f, dp=2)
    [[5, 3, 3], [5, 3, 3]]
    """
    check_axis("gather_documents", axis)
    sizes = check_sizes("gather_documents", batch)
    if axis.size == 1:
        return batch
    here = torch.tensor([list(sizes.values())], device=tree_leaves(batch)[0].device)
    ranks = [dict(zip(sizes, counts, strict=True)) for counts in all_gather(here, axis=axis, grad="slice").tolist()]
    parts: list[dict[str, object]] = [{} for _ in ranks]
    for field in dataclasses.fields(batch):  # type: ignore[arg-type]
        along = field.metadata.get("cut", "none")
        if along == "none":
            continue
        most = max(counts[along] for counts in ranks)

        def gather(x: Tensor, most: int = most) -> Tensor:
            padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x)))
            everyone: Tensor = all_gather(padded, axis=axis, grad="slice")
            return everyone.unflatten(0, (axis.size, most))  # type: ignore[no-untyped-call]

        found = tree_map(gather, getattr(batch, field.name))
        for rank, counts in enumerate(ranks):
            parts[rank][field.name] = tree_map(lambda x, r=rank, n=counts[along]: x[r, :n], found)
    return join_documents([dataclasses.replace(batch, **part) for part in parts])  # type: ignore[type-var]
