"""Which tensors share memory: what works in place must not write the same element twice.

    a  [0 .. 8)      b  [8 .. 16)      c  [12 .. 20)       b and c share; a is alone
    e  one element, expanded to four                       e shares with itself

Tensors count as sharing if the ranges from their first to their last element meet, also where they mesh like the teeth of
two combs: then a copy is made, or asked for, that could have been spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fstep.tree import tree_paths

if TYPE_CHECKING:
    from fstep.update.rows import Row


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Return the numbers of the tensors that share memory with another one, or with themselves."""
    starts = [x.data_ptr() for x in tensors]  # of all devices: no address is used twice
    found: set[int] = set()
    end, owner = 0, 0  # the furthest end so far, and whose it is
    for i in sorted(range(len(starts)), key=starts.__getitem__):
        x, start = tensors[i], starts[i]
        size = x.nbytes if x.is_contiguous() else _reach(x, i, found)
        if size:
            if start < end:
                found |= {i, owner}
            if start + size > end:
                end, owner = start + size, i
    return found


def _reach(x: Tensor, number: int, found: set[int]) -> int:
    """Return how many bytes lie between the beginning and the end of a tensor; note one that shares with itself."""
    if not x.numel():
        return 0
    if 0 in x.stride():
        found.add(number)
    return (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))) * x.itemsize


def refuse_donation(function: str, rows: Sequence[Row], grads: Any, recording: bool) -> None:
    """Refuse to work in place where that is wrong: under an outer derivative, or on memory that two leaves share."""
    if recording:
        raise ValueError(
            f"{function}: donate=True while an outer derivative is being taken (a leaf requires grad, or a torch.func "
            "transform is running); call it without donate=True, or detach what should not be differentiated"
        )
    if torch.compiler.is_compiling():
        return  # the compiler's tensors have no addresses
    held = [x for row in rows for x in (row.param, *row.slots)]
    if not (shared := overlapping(held)):
        return
    owners = [row.number for row in rows for _ in (row.param, *row.slots)]
    names = sorted({tree_paths(grads)[owners[i]] for i in shared})
    raise ValueError(
        f"{function}: donate=True, but {' and '.join(map(repr, names))} would be updated twice, because they share memory "
        "with each other or with themselves (an expanded tensor); keep a tied weight as one leaf (Tied), or clone them"
    )
