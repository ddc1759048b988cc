"""The documents of all ranks on every rank: each answered its own prompts, and a step takes one batch.

rank 0   docs 0 3   ─┐  padded to the longest rank's,
rank 1   docs 1 2   ─┴─ exchanged, cut to size again      docs 0 1 2 3 on both
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fstep.batch.batch import check_sizes, join_documents
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import all_gather
from fstep.tree import tree_leaves, tree_map, tree_paths

B = TypeVar("B")


@torch.no_grad()
def gather_documents(batch: B, *, axis: Axis) -> B:
    """Return the documents of all ranks of ``axis``, in the order of their ``index``: the inverse of `divide_documents`.

    Input: a shard, of any number of documents, none too; output: replicated, as `split_microbatches` takes a batch. Every
    rank's batch has the same fields, of the same dtypes; what is cut along "none" stays this rank's. Nothing is
    differentiated.

    Raises ValueError for a field of the wrong length, and on every rank if fields differ between ranks; TypeError for a
    field cut along an axis that no field counts.

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
        return join_documents([batch])  # in the order of the index, as on any mesh
    cut = [(f.name, f.metadata["cut"]) for f in dataclasses.fields(batch) if f.metadata.get("cut", "none") != "none"]  # type: ignore[arg-type]
    for name, along in cut:
        if along not in sizes:
            raise TypeError(
                f"gather_documents: {type(batch).__name__}.{name} is cut along {along!r}, which no field counts; pass "
                "documents, as make_docs returns them"
            )
    kinds = _kinds({name: getattr(batch, name) for name, _ in cut})
    mark = zlib.crc32(repr(kinds).encode())
    here = torch.tensor([[mark, *sizes.values()]], device=tree_leaves(batch)[0].device)
    everyone = all_gather(here, axis=axis, grad="slice").tolist()
    if odd := next((rank for rank, (other, *_) in enumerate(everyone) if other != everyone[0][0]), 0):
        raise ValueError(
            f"gather_documents: rank {odd} of the axis has other fields than rank 0, or of other dtypes or shapes; give all "
            f"ranks' batches the same, also where there are no documents (on this rank: {', '.join(kinds)})"
        )
    ranks = [dict(zip(sizes, counts, strict=True)) for _, *counts in everyone]
    parts: list[dict[str, object]] = [{} for _ in ranks]
    for name, along in cut:
        most = max(counts[along] for counts in ranks)

        def gather(x: Tensor, most: int = most) -> Tensor:
            padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x)))
            everyone: Tensor = all_gather(padded, axis=axis, grad="slice")
            return everyone.unflatten(0, (axis.size, most))  # type: ignore[no-untyped-call]

        found = tree_map(gather, getattr(batch, name))
        for rank, counts in enumerate(ranks):
            parts[rank][name] = tree_map(lambda x, r=rank, n=counts[along]: x[r, :n], found)
    return join_documents([dataclasses.replace(batch, **part) for part in parts])  # type: ignore[type-var]


def _kinds(fields: dict[str, Any]) -> list[str]:
    """Say what each tensor is, but for how many entries it has."""
    return [
        f"{path} {x.dtype} [n{''.join(f', {n}' for n in x.shape[1:])}]"
        for path, x in zip(tree_paths(fields), tree_leaves(fields), strict=True)
    ]
