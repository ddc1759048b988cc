"""Documents, and how every field of a batch is cut.

    Docs   tokens   a a a a b b c c c        cut along "token"
           weights  0 0 1 1 0 1 0 1 1        cut along "token"
           lengths  4       2   3            cut along "document", counts "token"
           index    0       1   2            cut along "document"

A batch is a dataclass of flat tensors. Each field declares the axis it is cut along, and a count field says how many
elements of a finer axis belong to each element of a coarser one. That is all `select_documents` and `join_documents` need,
so a batch with fields of your own (media items, patches of each item) is split and joined like the built-in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from fstep.tree import pytree, tree_leaves, tree_map, tree_paths

B = TypeVar("B")
CUTS = ("token", "document", "item", "patch", "none")


def cut(along: str, *, counts: str | None = None, **kwargs: Any) -> Any:
    """Declare a batch field and the axis its first dimension is cut along: token, document, item, patch or none.

    ``counts`` names the axis whose elements the field counts, e.g. ``lengths`` is cut along documents and counts tokens. A
    field holding a dict is cut value by value. A field cut along "none" is shared by all parts.

    >>> import torch, fstep
    >>> @fstep.pytree
    ... class Captions(fstep.Docs):
    ...     items: torch.Tensor = fstep.cut("document", counts="item")
    ...     captions: torch.Tensor = fstep.cut("item")
    >>> docs = vars(fstep.make_docs([[1, 2], [3, 4]]))
    >>> batch = Captions(**docs, items=torch.tensor([1, 2]), captions=torch.tensor([7, 8, 9]))
    >>> fstep.select_documents(batch, [1]).captions
    tensor([8, 9])
    """
    for axis in (along, counts or along):
        if axis not in CUTS:
            raise ValueError(f"cut: {axis!r} is no axis; pass one of {', '.join(CUTS)}")
    return optree.dataclasses.field(metadata={"cut": along, "counts": counts}, **kwargs)


@pytree
class Docs:
    """Documents laid end to end without padding: T tokens of D documents. Make one with `make_docs`.

    Everything per token is about that token: ``weights[t]`` is the weight of predicting token t, ``targets`` hold further
    values about predicting it (advantages, old log probabilities), ``inputs`` values that go in with it. ``index`` numbers
    the documents, so that order can be restored after splitting.

    >>> import fstep
    >>> docs = fstep.make_docs([[5, 6], [7]])
    >>> isinstance(docs, fstep.Docs), docs.weights
    (True, tensor([0., 1., 0.]))
    """

    tokens: Tensor = cut("token")
    weights: Tensor = cut("token")
    lengths: Tensor = cut("document", counts="token")
    index: Tensor = cut("document")
    targets: dict[str, Tensor] = cut("token")
    inputs: dict[str, Tensor] = cut("token")
    per_document: dict[str, Tensor] = cut("document")
    shared: dict[str, Any] = cut("none")


def _declared(function: str, batch: Any) -> list[tuple[str, str, str | None]]:
    """List (field, axis it is cut along, axis it counts)."""
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        raise TypeError(f"{function}: a batch is a {type(batch).__name__}; pass what make_docs returns")
    fields = []
    for f in dataclasses.fields(batch):
        if not f.metadata.get("pytree_node", True):
            continue  # a static field is no data: all parts have it
        if "cut" not in f.metadata:
            raise TypeError(
                f"{function}: {type(batch).__name__}.{f.name} does not say how it is cut; declare it as `{f.name}: Tensor = "
                'fstep.cut("token")`'
            )
        fields.append((f.name, f.metadata["cut"], f.metadata["counts"]))
    return fields


def check_sizes(function: str, batch: Any) -> dict[str, int]:
    """Return how long each axis is; refuse a batch with a field that is longer or shorter than the axis it is cut along."""
    fields = _declared(function, batch)
    counted = [counts for _, _, counts in fields if counts]
    if len(set(counted)) < len(counted):
        raise TypeError(f"{function}: two fields of {type(batch).__name__} count the same axis; let one of them count it")
    documents = [x for name, along, _ in fields if along == "document" for x in tree_leaves(getattr(batch, name))]
    sizes = {"document": len(documents[0]) if documents else 0}
    sizes |= {counts: int(getattr(batch, name).sum()) for name, _, counts in fields if counts}
    for name, along, _ in fields:
        value = getattr(batch, name)
        for path, x in zip(tree_paths(value), tree_leaves(value), strict=True):
            if along in sizes and len(x) != sizes[along]:
                field = f"{name}.{path}" if path else name
                raise ValueError(
                    f"{function}: {field} has {len(x)} entries and the batch {sizes[along]} {along}s; give one for each"
                )
    return sizes


def ragged_index(counts: Tensor, rows: Tensor) -> Tensor:
    """List the positions of the elements of ``rows`` in a flat ragged array with ``counts[i]`` elements in row i."""
    starts = counts.cumsum(0) - counts
    taken = counts[rows]
    shift = starts[rows] - (taken.cumsum(0) - taken)
    return torch.repeat_interleave(shift, taken) + torch.arange(int(taken.sum()), device=counts.device)


def _positions(batch: Any, counted: dict[str, tuple[str, str]], at: dict[str, Tensor], axis: str) -> Tensor:
    """Return the positions that are taken along ``axis``, and put them into ``at``, which has the documents'.

    A function that calls itself is defined here: one inside another is a reference cycle, which keeps tensors alive.
    """
    if axis not in at:
        if axis not in counted:
            raise TypeError(
                f"select_documents: {type(batch).__name__} has fields cut along {axis!r} and none that counts it; "
                f'declare one with fstep.cut("document", counts="{axis}")'
            )
        name, parent = counted[axis]
        at[axis] = ragged_index(getattr(batch, name), _positions(batch, counted, at, parent))
    return at[axis]


def select_documents(batch: B, rows: Sequence[int] | Tensor) -> B:
    """Return a batch of the documents numbered ``rows``, in that order, with everything that belongs to them.

    Raises TypeError for rows that are no numbers (a mask), IndexError for one past the end, ValueError for a batch with a
    field of the wrong length.

    >>> import fstep
    >>> docs = fstep.make_docs([[1, 2, 3], [4], [5, 6]])
    >>> fstep.select_documents(docs, [2, 1]).tokens
    tensor([5, 6, 4])
    """
    documents = check_sizes("select_documents", batch)["document"]
    fields = _declared("select_documents", batch)
    counted = {counts: (name, along) for name, along, counts in fields if counts}
    numbers = torch.as_tensor(rows)
    if numbers.numel() and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
        raise TypeError(
            f"select_documents: rows are {numbers.dtype}; pass the documents' numbers, e.g. mask.nonzero()[:, 0] for a mask"
        )
    at = {"document": numbers.to(torch.int64)}
    if numbers.numel() and not -documents <= int(numbers.min()) <= int(numbers.max()) < documents:
        raise IndexError(
            f"select_documents: rows are {int(numbers.min())} to {int(numbers.max())} and there are {documents} documents"
        )

    def take(value: Any, axis: str) -> Any:
        rows = _positions(batch, counted, at, axis)
        return tree_map(lambda x: x[rows.to(x.device)], value)

    new = {name: take(getattr(batch, name), along) for name, along, _ in fields if along != "none"}
    return dataclasses.replace(batch, **new)  # type: ignore[type-var]


def join_documents(batches: Sequence[B]) -> B:
    """Lay batches end to end, restoring the order of their documents' ``index`` if they have one.

    It inverts every way of cutting a batch into parts: ``join_documents(split_microbatches(b, num=n))`` is ``b``, if the
    documents of b stand in the order of their index, as `make_docs` lays them. (Those of a batch drawn in another order
    come back in the order of the index.) What is cut along "none" is taken from the first batch.

    Raises ValueError if there is no batch or a field does not hold the same names in all of them.

    >>> import fstep
    >>> docs = fstep.make_docs([[1, 2, 3], [4], [5, 6]])
    >>> parts = [fstep.select_documents(docs, [2]), fstep.select_documents(docs, [0, 1])]
    >>> fstep.join_documents(parts).tokens
    tensor([1, 2, 3, 4, 5, 6])
    """
    if not batches:
        raise ValueError("join_documents: there are no batches; pass at least one")
    first = batches[0]
    new = {}
    for name, along, _ in _declared("join_documents", first):
        if along == "none":
            continue
        parts = [getattr(b, name) for b in batches]
        for i, part in enumerate(parts):
            if tree_paths(part) != tree_paths(parts[0]):
                raise ValueError(
                    f"join_documents: {name} of batch {i} holds {tree_paths(part)}, and of batch 0 {tree_paths(parts[0])}; "
                    "give all batches the same"
                )
        new[name] = tree_map(lambda *xs: torch.cat(xs), *parts)
    joined = dataclasses.replace(first, **new)  # type: ignore[type-var]
    index = getattr(joined, "index", None)
    return joined if index is None else select_documents(joined, index.argsort(stable=True))
