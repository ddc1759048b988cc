"""Plans against naive planners and the best possible one, their bounds, their speed, and how full they make rows."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

import fstep
from tests.batch.cases import draw, generator


def slow_first_fit(lengths: list[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """First-fit decreasing, O(n^2): look at the bins from the first on; equal lengths in the order given."""
    bins: list[list[int]] = []
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        for b in bins:
            if sum(lengths[i] for i in b) + lengths[d] <= capacity:
                b.append(d)
                break
        else:
            bins.append([d])
    return tuple(tuple(sorted(b)) for b in bins)


def best_heaviest(costs: list[int], num: int) -> int:
    """Return the least possible cost of the heaviest bin, by trying every assignment."""
    best = sum(costs)
    for where in itertools.product(range(num), repeat=len(costs)):
        loads = [0] * num
        for c, b in zip(costs, where, strict=True):
            loads[b] += c
        best = min(best, max(loads))
    return best


def loads(bins: Any, costs: list[int]) -> list[int]:
    return [sum(costs[d] for d in b) for b in bins]


def each_once(bins: Any, n: int) -> bool:
    return sorted(d for b in bins for d in b) == list(range(n)) and all(list(b) == sorted(b) for b in bins)


def zipf(seed: int, n: int, longest: int) -> list[int]:
    """Draw lengths 1..longest with probability proportional to 1 / length: many short documents, few long ones."""
    p = 1 / torch.arange(1.0, longest + 1)
    return (torch.multinomial(p, n, replacement=True, generator=generator(seed)) + 1).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_first_fit_is_the_naive_one(seed: int) -> None:
    n, capacity = draw(seed, 0, 40, 1)[0], draw(seed + 100, 1, 30, 1)[0]
    lengths = draw(seed + 200, 0, capacity, n)
    bins = fstep.plan_first_fit(lengths, capacity)
    assert bins == slow_first_fit(lengths, capacity)
    assert each_once(bins, n) and max(loads(bins, lengths), default=0) <= capacity
    assert fstep.plan_first_fit(torch.tensor(lengths, dtype=torch.int64), capacity) == bins


@pytest.mark.parametrize("lengths", [[6] * 9, [10] * 5, [5] * 7, [1] * 23, [4, 4, 4, 4, 4], [7, 7, 3, 3], [], [0, 0]])
def test_first_fit_at_its_edges(lengths: list[int]) -> None:
    # Six of ten leaves no room for another: as many bins as documents, the most that can be needed.
    assert fstep.plan_first_fit(lengths, 10) == slow_first_fit(lengths, 10)


def test_first_fit_of_nothing_and_of_empty_documents() -> None:
    assert fstep.plan_first_fit([], 10) == ()
    assert fstep.plan_first_fit([0, 0], 0) == ((0, 1),)


@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_balanced_is_within_a_third_of_the_best(seed: int, num: int) -> None:
    costs = draw(seed, 1, 20, 7)
    bins = fstep.plan_balanced(costs, num)
    assert len(bins) == num and each_once(bins, 7)
    heaviest = max(loads(bins, costs))
    assert heaviest <= (4 / 3 - 1 / (3 * num)) * best_heaviest(costs, num) + 1e-9
    # No document can move to the lightest bin and leave its own the heavier one: what longest-first guarantees.
    least = min(loads(bins, costs))
    assert all(heaviest - min(costs[d] for d in b) <= least for b in bins if b and sum(costs[d] for d in b) == heaviest)


def test_balanced_puts_the_next_largest_where_least_is() -> None:
    # 8 | 6;  4 to the lighter second: 8 | 10;  4 to the first: 12 | 10;  2 to the second: 12 | 12
    assert fstep.plan_balanced([8, 2, 6, 4, 4], 2) == ((0, 4), (1, 2, 3))
    assert loads(fstep.plan_balanced([8, 2, 6, 4, 4], 2), [8, 2, 6, 4, 4]) == [12, 12]


def test_balanced_costs_need_not_be_lengths() -> None:
    lengths = [8, 2, 6, 4, 4]
    squares = [n * n for n in lengths]
    # 64 | 36 + 16 + 16, and the 4 goes to the first.
    assert loads(fstep.plan_balanced(squares, 2), squares) == [68, 68]
    assert fstep.plan_balanced([0.5, 0.25, 0.25], 2) == ((0,), (1, 2))


def test_more_bins_than_documents() -> None:
    bins = fstep.plan_balanced([3, 1], 5)
    assert sorted(bins) == [(), (), (), (0,), (1,)]
    assert fstep.plan_balanced([], 3) == ((), (), ())


@pytest.mark.parametrize("seed", range(20))
def test_balanced_never_exceeds_capacity(seed: int) -> None:
    lengths, costs = draw(seed, 1, 10, 30), draw(seed + 50, 0, 9, 30)
    num = len(fstep.plan_first_fit(lengths, 20)) + 2
    for given, sizes in ((lengths, None), (costs, lengths)):
        try:
            bins = fstep.plan_balanced(given, num, lengths=sizes, capacity=20)
        except ValueError as error:
            assert given is costs and "fits into none" in str(error)  # costs say nothing of what fits
            continue
        assert each_once(bins, 30) and max(loads(bins, lengths)) <= 20


def test_a_bin_too_full_for_one_document_still_takes_a_smaller_one() -> None:
    # Document 2 fits into the first bin only; document 3 fits into the second, which is the lighter one.
    assert fstep.plan_balanced([5, 4, 3, 3], 2, lengths=[1, 8, 5, 2], capacity=10) == ((0, 2), (1, 3))


def test_capacity_changes_where_a_document_goes() -> None:
    # By cost the last document belongs into the second bin, by length it fits only into the first.
    costs, lengths = [9, 1, 1], [1, 5, 5]
    assert fstep.plan_balanced(costs, 2) == ((0,), (1, 2))
    assert fstep.plan_balanced(costs, 2, lengths=lengths, capacity=9) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fstep.plan_first_fit([3, 12, 5], 10), "plan_first_fit: document 1 has 12 tokens and a bin holds 10; raise"),
        (lambda: fstep.plan_first_fit([3, -1], 10), "plan_first_fit: entry 1 is -1; lengths and costs are 0 or more"),
        (lambda: fstep.plan_first_fit([1], 0), "plan_first_fit: document 0 has 1 tokens and a bin holds 0"),
        (lambda: fstep.plan_balanced([1.0, float("nan")], 2), "plan_balanced: entry 1 is nan"),
        (lambda: fstep.plan_balanced([1], 0), "plan_balanced: num is 0; pass 1 or more"),
        (lambda: fstep.plan_balanced([1, 2], 1, lengths=[1]), "plan_balanced: 1 lengths for 2 costs; give one for each"),
        (lambda: fstep.plan_balanced([1, 2], 1, lengths=[1, -2]), "plan_balanced: entry 1 is -2"),
        (lambda: fstep.plan_balanced([6, 6, 6], 2, capacity=10), "plan_balanced: document 2 of 6 tokens fits into none"),
    ],
)  # fmt: skip
def test_plans_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_a_hundred_thousand_documents_take_seconds_at_most() -> None:
    lengths = zipf(0, 100_000, 4096)
    start = time.perf_counter()
    rows = fstep.plan_first_fit(lengths, 16384)
    middle = time.perf_counter()
    balanced = fstep.plan_balanced(lengths, len(rows) + 1, lengths=lengths, capacity=16384)
    end = time.perf_counter()
    assert each_once(rows, 100_000) and each_once(balanced, 100_000)
    assert max(loads(rows, lengths)) <= 16384 and max(loads(balanced, lengths)) <= 16384
    assert middle - start < 2 and end - middle < 2, (middle - start, end - middle)
    # All of one length over half the budget is the most bins there can be.
    start = time.perf_counter()
    assert len(fstep.plan_first_fit([9000] * 100_000, 16384)) == 100_000
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize("n", [500, 5000])
def test_rows_of_zipf_lengths_are_full(n: int) -> None:
    lengths = zipf(1, n, 4096)
    rows = fstep.plan_first_fit(lengths, 16384)
    fill = sum(lengths) / (16384 * len(rows))
    assert fill >= 0.98, fill
    assert len(rows) == -(-sum(lengths) // 16384)  # as few as the number of tokens allows


@pytest.mark.parametrize("num", [2, 4, 8])
def test_balanced_bins_of_zipf_lengths_are_even(num: int) -> None:
    lengths = zipf(2, 200, 4096)
    tokens = loads(fstep.plan_balanced(lengths, num), lengths)
    assert max(tokens) <= 1.001 * sum(lengths) / num, tokens
