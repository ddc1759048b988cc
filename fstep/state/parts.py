"""Parts of tensors: which elements a rank holds, which of them are in a file, and the runs of elements that both have.

    the whole [4, 6]        saved on tp 2, cut along dim 1      wanted by ZeRO rank 1 of 2, rows 2 and 3

    .  .  .  .  .  .        a  a  a  b  b  b                    .  .  .  .  .  .        a gives 2 runs of 3 elements,
    .  .  .  .  .  .        a  a  a  b  b  b                    .  .  .  .  .  .        b gives 2 runs of 3 elements
    .  .  .  .  .  .        a  a  a  b  b  b                    w  w  w  w  w  w
    .  .  .  .  .  .        a  a  a  b  b  b                    w  w  w  w  w  w

A part is a box, or a range of a box counted row by row. A tensor that holds it is the box's shape, or one-dimensional.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fstep.mesh.place import Place, Range


@dataclass(frozen=True)
class Part:
    """The elements of ``box``, a span for each dimension of the whole; if ``flat`` is given, only that span of them."""

    box: tuple[Range, ...]
    flat: Range | None = None

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def span(self) -> Range:
        """The elements it has of the box, counted row by row."""
        return (0, math.prod(self.extents)) if self.flat is None else self.flat

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.span[1] - self.span[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a tensor that holds it."""
        return self.extents if self.flat is None else (self.size,)


def whole(shape: Sequence[int]) -> Part:
    """Return the part that is all of a tensor."""
    return Part(tuple((0, n) for n in shape))


def part_of(place: Place) -> Part:
    """Return the part that a leaf is."""
    return Part(place.box, place.flat)


def part_to_json(part: Part) -> dict[str, Any]:
    """Write a part as plain lists."""
    flat = {} if part.flat is None else {"flat": list(part.flat)}
    return {"box": [list(span) for span in part.box], **flat}


def part_from_json(entry: dict[str, Any]) -> Part:
    """Read what `part_to_json` wrote."""
    flat = entry.get("flat")
    return Part(tuple((a, b) for a, b in entry["box"]), None if flat is None else (flat[0], flat[1]))


def runs(source: Part, target: Part) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start in source, start in target, length)`` for each run of elements that two parts have in common.

    Starts count the elements of a tensor that holds the part. Each run is contiguous in both; the order is that of the
    elements in the whole, and no two runs overlap.
    """
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(source.box, target.box, strict=True)]
    # Dimensions that both boxes have whole, from the last on, make one run together with the dimension before them.
    inner = len(common)
    while inner > 0 and source.box[inner - 1] == target.box[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    if outer:  # a flat range is a few rows of many
        for part in (source, target):
            row = math.prod(part.extents[1:])
            top, bottom = part.span[0] // max(row, 1), -(-part.span[1] // max(row, 1))
            common[0] = max(common[0][0], part.box[0][0] + top), min(common[0][1], part.box[0][0] + bottom)
    if any(start >= stop for start, stop in common):
        return
    length = math.prod(stop - start for start, stop in common[outer:])
    rest = [start for start, _ in common[outer:]]
    for index in itertools.product(*(range(*span) for span in common[:outer])):
        first = (*index, *rest)
        s, t = _number(source, first), _number(target, first)
        # Where the run is cut by the ends of either flat range.
        skip = max(0, source.span[0] - s, target.span[0] - t)
        stop = min(length, source.span[1] - s, target.span[1] - t)
        if skip < stop:
            yield s + skip - source.span[0], t + skip - target.span[0], stop - skip


def _number(part: Part, index: Sequence[int]) -> int:
    """Count the elements of the box before this one."""
    place = 0
    for i, (start, stop) in zip(index, part.box, strict=True):
        place = place * (stop - start) + i - start
    return place


def check_cover(shape: Sequence[int], parts: Iterable[Part]) -> str | None:
    """Return ``None`` if the parts together are the whole and no two overlap; else say what is wrong."""
    total = math.prod(shape)
    boxes: dict[tuple[Range, ...], list[Range]] = {}
    for part in parts:
        if part.size or not total:
            boxes.setdefault(part.box, []).append(part.span)
    for box, spans in boxes.items():
        at = 0
        for start, stop in sorted(spans):
            if start != at:
                return (
                    f"elements {min(at, start)} to {max(at, start)} of box {box} are {'missing' if at < start else 'double'}"
                )
            at = stop
        if at != Part(box).size:
            return f"elements {at} to {Part(box).size} of box {box} are missing"
        if any(not 0 <= start <= stop <= n for (start, stop), n in zip(box, shape, strict=True)):
            return f"box {box} is not within shape {tuple(shape)}"
    for first, second in itertools.combinations(boxes, 2):
        if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(first, second, strict=True)):
            return f"boxes {first} and {second} overlap"
    held = sum(Part(box).size for box in boxes)
    if held != total or not boxes:
        return f"{total - held} of {total} elements are missing"
    return None
