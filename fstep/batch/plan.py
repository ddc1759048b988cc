"""Plans: which documents go together. Lengths in, bins out; no tensors of tokens are touched.

plan_first_fit   as few rows as possible of at most `capacity` tokens
plan_balanced    a given number of bins with costs as equal as possible
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor

Bins = tuple[tuple[int, ...], ...]


def _descending(function: str, values: Sequence[float] | Tensor) -> tuple[list[float], list[int]]:
    given = values.tolist() if isinstance(values, Tensor) else list(values)
    for i, v in enumerate(given):
        if not v >= 0:
            raise ValueError(f"{function}: entry {i} is {v}; lengths and costs are 0 or more")
    return given, sorted(range(len(given)), key=given.__getitem__, reverse=True)


def plan_first_fit(lengths: Sequence[int] | Tensor, capacity: int) -> Bins:
    """Put each length, longest first, into the first bin with room for it (first-fit decreasing; Johnson, 1973).

    It needs at most 11/9 of the fewest bins possible, plus one. The bin is found in a tree of maxima, in O(log n), so
    100,000 documents take about a second. Bins list document numbers in ascending order.

    Raises ValueError if a length exceeds ``capacity``.

    >>> import fstep
    >>> fstep.plan_first_fit([3, 7, 5, 2, 3], capacity=10)
    ((0, 1), (2, 3, 4))
    """
    given, order = _descending("plan_first_fit", lengths)
    if order and given[order[0]] > capacity:
        raise ValueError(
            f"plan_first_fit: document {order[0]} has {given[order[0]]} tokens and a bin holds {capacity}; raise the budget "
            "or cut the document"
        )
    # Any two neighbouring bins hold more than one capacity together, so twice the volume is room enough.
    most = min(len(order), 2 * int(sum(given) // capacity + 1)) if capacity > 0 else len(order)
    width = 1 << max(most - 1, 0).bit_length()
    room: list[float] = [capacity] * (2 * width)  # room[1] is the root; room[i] the most room in any bin below node i
    bins: list[list[int]] = []
    for document in order:
        need = given[document]
        node = 1
        while node < width:
            node *= 2
            if room[node] < need:
                node += 1
        if node - width == len(bins):
            bins.append([])
        bins[node - width].append(document)
        left = room[node] = room[node] - need
        while node > 1:
            other = room[node ^ 1]
            left = left if left > other else other
            node >>= 1
            if room[node] == left:
                break
            room[node] = left
    return tuple(tuple(sorted(b)) for b in bins)


def plan_balanced(
    costs: Sequence[float] | Tensor,
    num: int,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    capacity: int | None = None,
) -> Bins:
    """Put each cost, largest first, into the bin that has least (longest processing time first; Graham, 1969).

    The heaviest bin is at most 4/3 of the best possible. Pass lengths as costs to balance tokens, and their squares to
    balance attention. With ``capacity`` no bin holds more than that many tokens of ``lengths`` (default: the costs).

    Raises ValueError if no bin has room left for a document.

    >>> import fstep
    >>> lengths = [8, 2, 6, 4, 4]
    >>> fstep.plan_balanced(lengths, 2)
    ((0, 4), (1, 2, 3))
    >>> fstep.plan_balanced([n * n for n in lengths], 2)
    ((0, 1), (2, 3, 4))
    """
    if num < 1:
        raise ValueError(f"plan_balanced: num is {num}; pass 1 or more")
    given, order = _descending("plan_balanced", costs)
    sizes = given if lengths is None else _descending("plan_balanced", lengths)[0]
    if len(sizes) != len(given):
        raise ValueError(f"plan_balanced: {len(sizes)} lengths for {len(given)} costs; give one for each document")
    bins: list[list[int]] = [[] for _ in range(num)]
    held = [0.0] * num
    lightest = [(0.0, b) for b in range(num)]
    for document in order:
        full = []
        while capacity is not None and lightest and held[lightest[0][1]] + sizes[document] > capacity:
            full.append(heapq.heappop(lightest))
        if not lightest:
            raise ValueError(
                f"plan_balanced: document {document} of {sizes[document]} tokens fits into none of {num} bins of {capacity}"
                "; use more bins, or plan_first_fit"
            )
        cost, b = lightest[0]
        heapq.heapreplace(lightest, (cost + given[document], b))
        held[b] += sizes[document]
        bins[b].append(document)
        for entry in full:
            heapq.heappush(lightest, entry)
    return tuple(tuple(sorted(b)) for b in bins)
