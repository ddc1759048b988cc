"""Drawing tokens: beside a naive reference in Python's own numbers, over grids of numbers that leave nothing to chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Key, sample_tokens
from fstep.rollout import sample

F64 = torch.float64
LAST = 1 - 2.0**-53  # the largest number that a key draws


def reference(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Probabilities of what may be drawn, by sorting and adding up."""
    top = max(logits)
    weight = [math.exp((x - top) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    total, kept, mass = math.fsum(weight[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weight[i] / total
        if top_p is not None and mass >= top_p:
            break
    left = math.fsum(weight[i] for i in kept)
    return [weight[i] / left if i in kept else 0.0 for i in range(len(logits))]


def grid(logits: Tensor, n: int, **options: Any) -> Tensor:
    """Draw with n numbers spread evenly over [0, 1), and return how often each token came."""
    numbers = (torch.arange(n, dtype=F64) + 0.5) / n
    ids, _ = sample_tokens(logits.expand(n, -1), numbers, **options)
    return ids.bincount(minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.61, 0.93, 1.0])
def test_what_is_drawn_and_how_often(temperature: float, top_k: int | None, top_p: float | None) -> None:
    for seed in range(3):
        # Whole numbers: many logits are equal, and what is cut off falls among them.
        drawn = Key.seed(seed).normal((11,), dtype=F64) * 2
        logits = drawn.round() if seed else drawn
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        want = reference(logits.tolist(), **options)
        got = grid(logits, 5000, **options)
        for count, p in zip(got.tolist(), want, strict=True):
            assert abs(count - 5000 * p) <= 1 + 1e-6 if p else count == 0


def test_frequencies_of_a_key_are_those_of_the_distribution() -> None:
    n, p = 100_000, torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=F64)
    ids, _ = sample_tokens(p.log().expand(n, -1), Key.seed(3).uniform((n,), dtype=F64))
    off = (ids.bincount(minlength=5) - n * p) / (n * p).sqrt()
    assert float(off.square().sum()) < 20  # chi-square of 4 degrees: above it once in two thousand


def test_the_first_token_whose_sum_exceeds_the_number() -> None:
    logits = torch.zeros(8, 4, dtype=F64)  # sums .25, .5, .75, 1, exactly
    numbers = torch.tensor([0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.99, LAST], dtype=F64)
    assert sample_tokens(logits, numbers)[0].tolist() == [0, 0, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_the_token_that_reaches_top_p_is_the_last(top_p: float, kept: int) -> None:
    counts = grid(torch.zeros(4, dtype=F64), 100, top_p=top_p)
    assert (counts > 0).tolist() == [i < kept for i in range(4)]


def test_of_equal_tokens_those_of_lower_ids_are_kept() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    assert (grid(logits, 50, top_k=3) > 0).tolist() == [True, True, False, False, True]


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64).log()
    # Of 0.4 and 0.3 the first has 4/7 = 0.571: it reaches 0.55, which 0.4 of all would not.
    assert (grid(logits, 50, top_k=2, top_p=0.55) > 0).tolist() == [True, False, False, False]
    assert (grid(logits, 50, top_k=2, top_p=0.58) > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_what_has_no_probability_is_never_drawn(options: dict[str, Any]) -> None:
    inf = float("inf")
    logits = torch.tensor([-inf, -1e4, 0.0, -inf, 0.5, -inf]).expand(3, -1)
    ids, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.5, LAST], dtype=F64), **options)
    assert ids.tolist() == [2, 4, 4]
    assert logprobs.isfinite().all()


def test_a_sum_that_goes_back_by_a_rounding_finds_nothing_that_has_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    # As sums made in parallel do, on a GPU.
    up = torch.tensor([[0.5, 0.5 + 2.0**-53, 1.0, 1.0 + 2.0**-52], [0.5, 0.5, 1.0 - 2.0**-53, 1.0]], dtype=F64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: up)
    p = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=F64).expand(2, -1)
    assert sample._draw(p, torch.tensor([0.5, LAST], dtype=F64)).tolist() == [2, 2]


def test_a_large_vocabulary_is_drawn_from_to_its_end() -> None:
    logits = torch.zeros(2, 200_000).index_fill(1, torch.tensor([199_999]), -torch.inf)
    assert sample_tokens(logits, torch.tensor([0.0, LAST], dtype=F64))[0].tolist() == [0, 199_998]


def test_greedy_is_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [-torch.inf, -torch.inf, -9.0]])
    ids, logprobs = sample_tokens(logits, None, temperature=0, top_k=2, top_p=0.5)
    assert ids.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, torch.tensor([3 - math.log(1 + 2 * math.exp(3)), 0.0]))


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 3])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.4}])
def test_log_probabilities_are_of_the_whole_distribution(temperature: float, options: dict[str, Any]) -> None:
    logits = Key.seed(1).normal((30, 9), dtype=F64)
    ids, logprobs = sample_tokens(logits, Key.seed(2).uniform((30,), dtype=F64), temperature=temperature, **options)
    for row, i, found in zip(logits.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
        t = temperature or 1
        assert found == pytest.approx(row[i] / t - math.log(math.fsum(math.exp(x / t) for x in row)), abs=1e-13)


def test_they_are_the_scores_of_training() -> None:
    hidden, weight = Key.seed(1).normal((20, 6)), Key.seed(2).normal((50, 6))
    ids, logprobs = sample_tokens(fstep.head_logits(hidden, weight), Key.seed(3).uniform((20,)), temperature=0.7)
    torch.testing.assert_close(logprobs, fstep.token_logprobs(hidden, weight, ids, temperature=0.7), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "out"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)])
def test_dtypes(dtype: torch.dtype, out: torch.dtype) -> None:
    ids, logprobs = sample_tokens(torch.zeros(2, 3, dtype=dtype), torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert (ids.dtype, logprobs.dtype) == (torch.int64, out)
    ids, logprobs = sample_tokens(torch.zeros(0, 3, dtype=dtype), torch.zeros(0), top_k=2)
    assert (ids.dtype, logprobs.dtype, ids.shape, logprobs.shape) == (torch.int64, out, (0,), (0,))


def test_keeping_all_changes_no_token() -> None:
    logits, numbers = Key.seed(1).normal((500, 40)), Key.seed(2).uniform((500,), dtype=F64)
    plain = sample_tokens(logits, numbers)
    for options in ({"top_p": 1.0}, {"top_p": 1}, {"top_k": 40}, {"top_k": 99, "top_p": 1.0}):
        fstep.testing.assert_trees_close(sample_tokens(logits, numbers, **options), plain, rtol=0)


def test_a_row_depends_on_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, numbers = Key.seed(1).normal((9, 5)), Key.seed(2).uniform((9,), dtype=F64)
    ids, logprobs = sample_tokens(logits, numbers, top_k=3, top_p=0.8)
    order = torch.tensor([4, 0, 7])
    fstep.testing.assert_trees_close(
        sample_tokens(logits[order], numbers[order], top_k=3, top_p=0.8), (ids[order], logprobs[order]), rtol=0
    )
    monkeypatch.setattr(sample, "CHUNK", 11)  # two rows at a time
    fstep.testing.assert_trees_close(sample_tokens(logits, numbers, top_k=3, top_p=0.8), (ids, logprobs), rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_without_a_distribution_says_so_in_its_log_probability(bad: float | None, temperature: float) -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1] = 0.0 if bad is None else bad
    if bad is None:
        logits[0] = -torch.inf
    ids, logprobs = sample_tokens(logits, torch.tensor([0.5, 0.9]), temperature=temperature)
    assert not logprobs[0].isfinite() and logprobs[1].isfinite()
    assert ids[1] == (2 if temperature else 0) and (not temperature or ids[0] == 0)


def test_nothing_changes() -> None:
    fstep.testing.assert_pure(sample_tokens, torch.zeros(2, 3), torch.tensor([0.1, 0.2]), top_k=2, top_p=0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "sample_tokens: logits is a list; pass a tensor"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits are torch.float32 \(3,\); pass floats \[rows, vocab\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "pass floats"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "logits are torch.int64"),
        ({"uniform": None}, TypeError, "uniform is a NoneType; pass numbers"),
        ({"uniform": torch.zeros(3)}, ValueError, r"uniform is torch.float32 \(3,\) for 2 rows; pass one of \[0, 1\) a row"),
        ({"uniform": torch.zeros(2, dtype=torch.int64)}, ValueError, "uniform is torch.int64"),
        ({"temperature": -1}, ValueError, "temperature is -1; pass a positive number, or 0"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature is a Tensor; pass a number"),
        ({"top_k": 0}, ValueError, "top_k is 0; pass 1 or more, or None"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5; pass a whole number"),
        ({"top_k": True}, TypeError, "top_k is True"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0; pass a number above 0 and up to 1"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"top_p": "1"}, TypeError, "top_p is a str; pass a number"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"logits": torch.zeros(2, 3), "uniform": torch.zeros(2), **change}
    with pytest.raises(error, match=message):
        sample_tokens(**options)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[3.0, 5.0, 4.0], [-7.0, -9.0, -torch.inf]])
    for temperature in (1e-310, 1e-30, 1e-3):
        ids, logprobs = sample_tokens(logits, torch.tensor([0.999, 0.0], dtype=F64), temperature=temperature)
        assert ids.tolist() == [1, 0] and logprobs.tolist() == [0, 0]
