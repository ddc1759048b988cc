"""Parts of tensors, against sets of indices."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from fstep.state.parts import Part, check_cover, part_from_json, part_to_json, runs, whole


def elements(shape: tuple[int, ...], part: Part) -> list[int]:
    """Number the elements of the whole that a part has, in the order of the tensor that holds it."""
    numbers = torch.arange(math.prod(shape)).reshape(shape)[tuple(slice(*span) for span in part.box)].reshape(-1)
    return numbers[slice(*(part.flat or (0, None)))].tolist()


def some_part(rng: random.Random, shape: tuple[int, ...]) -> Part:
    box = tuple(tuple(sorted((rng.randint(0, n), rng.randint(0, n)))) if rng.random() < 0.6 else (0, n) for n in shape)
    size = Part(box).size
    flat = tuple(sorted((rng.randint(0, size), rng.randint(0, size)))) if rng.random() < 0.5 else None
    return Part(box, flat)


@pytest.mark.parametrize("shape", [(), (5,), (1,), (4, 6), (3, 1, 4), (2, 3, 4), (5, 0, 2), (3, 2, 2, 3)])
def test_runs_have_what_both_parts_have_and_nothing_else(shape: tuple[int, ...]) -> None:
    rng = random.Random(len(shape))
    for _ in range(400):
        source, target = some_part(rng, shape), some_part(rng, shape)
        here, there = elements(shape, source), elements(shape, target)
        assert math.prod(source.shape) == source.size == len(here)
        copied: dict[int, int] = {}
        last = -1
        for s, t, n in runs(source, target):
            assert n > 0 and s > last
            last = s + n - 1
            for i in range(n):
                assert here[s + i] == there[t + i]
                assert t + i not in copied
                copied[t + i] = here[s + i]
        assert set(copied.values()) == set(here) & set(there)


def test_runs_are_as_long_as_they_can_be() -> None:
    assert list(runs(whole((4, 6, 5)), whole((4, 6, 5)))) == [(0, 0, 120)]
    assert list(runs(whole((4, 6, 5)), Part(((1, 3), (0, 6), (0, 5))))) == [(30, 0, 60)]
    assert list(runs(whole((4, 6, 5)), Part(((0, 4), (2, 4), (0, 5))))) == [(30 * i + 10, 10 * i, 10) for i in range(4)]
    assert list(runs(whole((4, 6)), Part(((0, 4), (0, 6)), (7, 19)))) == [(7, 0, 12)]


def test_a_flat_range_of_many_rows_looks_at_its_own_rows_only() -> None:
    # All rows are more than this machine counts to.
    rows = 1 << 50
    target = Part(((0, rows), (0, 4)), (2000, 2012))
    assert list(runs(Part(((0, rows), (0, 2))), target)) == [(1000, 0, 2), (1002, 4, 2), (1004, 8, 2)]
    assert list(runs(target, Part(((0, rows), (0, 2))))) == [(0, 1000, 2), (4, 1002, 2), (8, 1004, 2)]


@pytest.mark.parametrize(
    ("shape", "parts", "message"),
    [
        ((4, 6), [whole((4, 6))], None),
        ((4, 6), [Part(((0, 4), (0, 2))), Part(((0, 4), (2, 6)))], None),
        ((4, 6), [Part(((0, 4), (0, 6)), (0, 7)), Part(((0, 4), (0, 6)), (7, 24)), Part(((0, 4), (0, 6)), (0, 0))], None),
        ((4, 6), [Part(((0, 2), (0, 6)), (5, 12)), Part(((2, 4), (0, 6))), Part(((0, 2), (0, 6)), (0, 5))], None),
        ((), [Part(())], None),
        ((0, 3), [Part(((0, 0), (0, 3)))], None),
        ((4, 6), [], "24 of 24 elements are missing"),
        ((4, 6), [Part(((0, 4), (0, 2)))], "16 of 24 elements are missing"),
        ((4, 6), [Part(((0, 4), (0, 3))), Part(((0, 4), (2, 6)))], r"boxes .* overlap"),
        ((4, 6), [whole((4, 6)), Part(((1, 2), (1, 2)))], r"boxes .* overlap"),
        ((4, 6), [Part(((0, 4), (0, 6)), (0, 7)), Part(((0, 4), (0, 6)), (8, 24))], r"elements 7 to 8 of box .* missing"),
        ((4, 6), [Part(((0, 4), (0, 6)), (0, 7)), Part(((0, 4), (0, 6)), (6, 24))], r"elements 6 to 7 of box .* double"),
        ((4, 6), [Part(((0, 4), (0, 6)), (0, 7)), Part(((0, 4), (0, 6)), (7, 23))], r"elements 23 to 24 of box .* missing"),
        ((4, 6), [Part(((0, 4), (0, 6)), (0, 7)), whole((4, 6))], r"elements 0 to 7 of box .* double"),
        ((4, 6), [Part(((0, 4), (3, 9)))], r"is not within shape \(4, 6\)"),
    ],
)
def test_cover(shape: tuple[int, ...], parts: list[Part], message: str | None) -> None:
    wrong = check_cover(shape, parts)
    assert wrong is None if message is None else wrong is not None and re.search(message, wrong), wrong


def test_parts_go_through_json() -> None:
    for part in (Part(()), whole((2, 3)), Part(((0, 2), (1, 3)), (1, 4))):
        assert part_from_json(part_to_json(part)) == part
