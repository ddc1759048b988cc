"""Preference and reward losses beside plain Python: a loop over pairs, with math's exp and log, and slopes by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fstep
import fstep.testing
from fstep import Ratio

F64 = torch.float64
# Two numbers a document, documents of pairs in any order: the pair of document 0 and 3 is numbered 9, and so on.
PAIR = torch.tensor([9, 4, 5, 9, 5, 4])
CHOSEN = torch.tensor([True, False, True, False, False, True])
ROWS = [(5, 1), (2, 4), (0, 3)]  # chosen, rejected; by the pair's number
SUMS = [-3.0, -7.5, 0.4, 2.0, -1.25, -6.0]
COUNTS = [3.0, 5.0, 1.0, 2.0, 4.0, 6.0]


def sums(num: Any = SUMS, den: Any = COUNTS) -> Ratio:
    return Ratio(torch.tensor(num, dtype=F64), torch.tensor(den, dtype=F64))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo(c: float, r: float, nc: float, nr: float, beta: float = 0.3, s: float = 0.0) -> float:
    z = beta * (c - r)
    return -(1 - s) * math.log(sigmoid(z)) - s * math.log(sigmoid(-z))


def ipo(c: float, r: float, nc: float, nr: float, beta: float = 0.3, average: bool = False) -> float:
    if average:
        c, r = c / nc, r / nr
    return (c - r - 1 / (2 * beta)) ** 2


def simpo(c: float, r: float, nc: float, nr: float, beta: float = 0.3, margin: float = 0.0) -> float:
    return -math.log(sigmoid(beta * (c / nc - r / nr) - margin))


def orpo(c: float, r: float, nc: float, nr: float, beta: float = 0.3) -> float:
    pc, pr = math.exp(c / nc), math.exp(r / nr)
    ratio = (pc / (1 - pc)) / (pr / (1 - pr))
    return -math.log(pc) - beta * math.log(ratio / (1 + ratio))


BELOW = [-3.0, -7.5, -0.4, -2.0, -1.25, -6.0]  # log probabilities
CASES: dict[str, tuple[Callable[..., Any], Callable[..., float], list[float]]] = {
    "dpo": (lambda x, p: fstep.dpo_loss(x, p, beta=0.3), dpo, SUMS),
    "dpo, smoothed": (
        lambda x, p: fstep.dpo_loss(x, p, beta=0.7, label_smoothing=0.1),
        lambda *a: dpo(*a, beta=0.7, s=0.1),
        SUMS,
    ),
    "ipo": (lambda x, p: fstep.ipo_loss(x, p, beta=0.3), ipo, SUMS),
    "ipo, mean": (
        lambda x, p: fstep.ipo_loss(x, p, beta=0.7, average=True),
        lambda *a: ipo(*a, beta=0.7, average=True),
        SUMS,
    ),
    "simpo": (lambda x, p: fstep.simpo_loss(x, p, beta=2.5, margin=0.5), lambda *a: simpo(*a, beta=2.5, margin=0.5), BELOW),
    "orpo": (lambda x, p: fstep.orpo_loss(x, p, beta=0.3), orpo, BELOW),
    "nll": (lambda x, p: (fstep.chosen_nll(x, p), {}), lambda c, r, nc, nr: -c / nc, BELOW),
}
every_loss = pytest.mark.parametrize("name", CASES)


def by_hand(f: Callable[..., float], num: list[float], weights: list[float]) -> tuple[float, list[float]]:
    """Add up over pairs in Python, and take slopes by central differences."""

    def total(x: list[float]) -> float:
        found = 0.0
        for (c, r), w in zip(ROWS, weights, strict=True):
            found += w * f(x[c], x[r], COUNTS[c], COUNTS[r])
        return found

    slopes, h = [], 1e-6
    for i in range(len(num)):
        above, below = ([x + s * h * (i == j) for j, x in enumerate(num)] for s in (1, -1))
        slopes.append((total(above) - total(below)) / (2 * h))
    return total(num), slopes


@every_loss
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.5, 0.5, 1.5, 2.0]], ids=["even", "weighted"])
def test_by_hand(name: str, weights: list[float] | None) -> None:
    f, oracle, num = CASES[name]
    each = [1.0] * 3 if weights is None else [weights[c] for c, _ in ROWS]
    pairs = fstep.find_pairs(PAIR, CHOSEN, None if weights is None else torch.tensor(weights, dtype=F64))
    x = sums(num)
    x.num.requires_grad_()
    loss, metrics = fstep.testing.assert_pure(f, x, pairs)
    value, slopes = by_hand(oracle, num, each)
    assert loss.num.item() == pytest.approx(value, rel=1e-12) and loss.den.item() == sum(each)
    assert torch.autograd.grad(loss.num, x.num)[0].tolist() == pytest.approx(slopes, rel=1e-7, abs=1e-9)
    assert not any(r.num.requires_grad for r in metrics.values())


def test_slope_of_dpo_in_closed_form() -> None:
    # d/dR_chosen of -(1 - s) log sigmoid(z) - s log sigmoid(-z) is -beta ((1 - s) sigmoid(-z) - s sigmoid(z))
    x, beta, s = sums(), 0.3, 0.2
    x.num.requires_grad_()
    loss, _ = fstep.dpo_loss(x, fstep.find_pairs(PAIR, CHOSEN), beta=beta, label_smoothing=s)
    want = [0.0] * 6
    for c, r in ROWS:
        z = beta * (SUMS[c] - SUMS[r])
        want[c] = -beta * ((1 - s) * sigmoid(-z) - s * sigmoid(z))
        want[r] = -want[c]
    assert torch.autograd.grad(loss.num, x.num)[0].tolist() == pytest.approx(want, rel=1e-14)


def test_metrics_by_hand() -> None:
    _, m = fstep.dpo_loss(sums(), fstep.find_pairs(PAIR, CHOSEN), beta=0.5)
    c, r = [0.5 * SUMS[i] for i, _ in ROWS], [0.5 * SUMS[j] for _, j in ROWS]
    assert m["reward_chosen"].num.item() == pytest.approx(sum(c)) and m["reward_rejected"].num.item() == pytest.approx(
        sum(r)
    )
    assert m["reward_margin"].num.item() == pytest.approx(sum(c) - sum(r))
    assert m["accuracy"].num.item() == 2 and all(x.den.item() == 3 for x in m.values())  # -6 > -7.5, 0.4 > -1.25, -3 < 2
    _, m = fstep.dpo_loss(sums([1.0] * 6), fstep.find_pairs(PAIR, CHOSEN), beta=0.5)
    assert m["accuracy"].mean().item() == 0.5  # ties
    _, m = fstep.orpo_loss(sums(BELOW), fstep.find_pairs(PAIR, CHOSEN), beta=0.5)
    assert m["nll"].num.item() == pytest.approx(-sum(BELOW[i] / COUNTS[i] for i, _ in ROWS))
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (b / n for b, n in zip(BELOW, COUNTS, strict=True))]
    assert m["log_odds"].num.item() == pytest.approx(sum(odds[i] - odds[j] for i, j in ROWS))
    assert m["reward_margin"].num.item() == pytest.approx(
        0.5 * sum(BELOW[i] / COUNTS[i] - BELOW[j] / COUNTS[j] for i, j in ROWS)
    )


@every_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 3], ids=["chosen", "rejected"])
def test_a_pair_of_which_one_is_masked_is_left_out(name: str, side: int, junk: float) -> None:
    f, oracle, num = CASES[name]
    x = sums([junk if i == side else v for i, v in enumerate(num)], [0.0 if i == side else v for i, v in enumerate(COUNTS)])
    x.num.requires_grad_()
    loss, metrics = f(x, fstep.find_pairs(PAIR, CHOSEN))
    value, slopes = by_hand(oracle, num, [1.0, 1.0, 0.0])
    assert loss.num.item() == pytest.approx(value, rel=1e-12) and loss.den.item() == 2
    got = torch.autograd.grad(loss.num, x.num)[0]
    assert got.tolist() == pytest.approx(slopes, rel=1e-7, abs=1e-9) and got[0] == got[3] == 0
    assert all(r.num.isfinite() and r.den == 2 for r in metrics.values())


@every_loss
@pytest.mark.parametrize("documents", [0, 6])
def test_nothing_to_learn_is_zero(name: str, documents: int) -> None:
    x = sums(CASES[name][2][:documents], [0.0] * documents)
    x.num.requires_grad_()
    loss, metrics = CASES[name][0](x, fstep.find_pairs(PAIR[:documents], CHOSEN[:documents]))
    assert loss.num == loss.den == loss.mean() == 0 and all(r.mean() == 0 for r in metrics.values())
    assert torch.autograd.grad(loss.num, x.num)[0].tolist() == [0.0] * documents


@every_loss
def test_far_apart_is_finite(name: str) -> None:
    # Where a sigmoid is 0 or 1, in float32: the loss is linear, and its slope one or none.
    for far in (-1e4, -1e-6):
        x = Ratio(torch.tensor([far, -50.0, -1.0, -1.0, -1e4, -50.0], requires_grad=True), torch.ones(6))
        loss, _ = CASES[name][0](x, fstep.find_pairs(PAIR, CHOSEN))
        assert loss.num.isfinite() and torch.autograd.grad(loss.num, x.num)[0].isfinite().all()


def test_certain_answers_have_finite_odds() -> None:
    x = Ratio(torch.tensor([0.0, -1.0, 0.0, 0.0, -1.0, -2.0], requires_grad=True), torch.ones(6))
    loss, _ = fstep.orpo_loss(x, fstep.find_pairs(PAIR, CHOSEN), beta=1.0)
    assert loss.num.isfinite() and torch.autograd.grad(loss.num, x.num)[0].isfinite().all()


@pytest.mark.parametrize("m", [-1e-7, -1e-3, -0.69, -0.70, -5.0, -60.0])
def test_odds_keep_their_digits(m: float) -> None:
    # log(1 - exp(m)) in float64 is right to 1e-9 even where float32 has none left.
    from fstep.loss.preference import _log_odds

    want = m - math.log(-math.expm1(m))
    assert _log_odds(torch.tensor(m, dtype=torch.float32)).item() == pytest.approx(want, rel=3e-6, abs=1e-7)
    assert _log_odds(torch.tensor(m, dtype=F64)).item() == pytest.approx(want, rel=1e-12)


# KTO --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.0, 0.8, -2.0])
def test_kto_by_hand(kl: float) -> None:
    beta, good, bad = 0.4, 1.25, 0.1
    x = sums(den=[3.0, 5.0, 0.0, 2.0, 4.0, 6.0])
    x.num.requires_grad_()
    base = torch.tensor(kl, dtype=F64, requires_grad=True)
    loss, m = fstep.testing.assert_pure(fstep.kto_loss, x, CHOSEN, beta=beta, kl=base, desirable=good, undesirable=bad)
    value, want, z = 0.0, [0.0] * 6, max(kl, 0.0)
    for i in (0, 1, 3, 4, 5):
        sign, factor = (1, good) if CHOSEN[i] else (-1, bad)
        p = sigmoid(beta * sign * (SUMS[i] - z))
        value += factor * (1 - p)
        want[i] = -factor * sign * beta * p * (1 - p)
    assert loss.num.item() == pytest.approx(value, rel=1e-14) and loss.den.item() == 5
    got, of_base = torch.autograd.grad(loss.num, (x.num, base), allow_unused=True)
    assert got.tolist() == pytest.approx(want, rel=1e-12) and of_base is None
    assert m["reward_chosen"].num.item() == pytest.approx(beta * (SUMS[0] + SUMS[5])) and m["reward_chosen"].den == 2
    assert m["reward_rejected"].num.item() == pytest.approx(beta * (SUMS[1] + SUMS[3] + SUMS[4]))
    assert m["reward_rejected"].den == 3 and m["kl"].mean().item() == pytest.approx(z)


def test_baseline_is_a_sum_over_documents_that_count() -> None:
    x = sums(den=[3.0, 5.0, 0.0, 2.0, 4.0, 6.0])
    x.num.requires_grad_()
    found = fstep.kto_kl(x)
    assert found.num.item() == pytest.approx(sum(SUMS) - SUMS[2]) and found.den == 5 and not found.num.requires_grad


# Reward models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.75, [0.5, -9.0, 1.0, -9.0, -9.0, 0.25]], ids=["none", "one", "each"])
@pytest.mark.parametrize("center", [0.0, 0.05])
def test_bradley_terry_by_hand(margin: Any, center: float) -> None:
    weights = torch.tensor([0.0, 2.0, 1.0, 0.0, 1.0, 2.0], dtype=F64)
    given = [math.nan if i == 3 else v for i, v in enumerate(SUMS)]  # its pair has no weight
    rewards = torch.tensor(given, dtype=F64, requires_grad=True)
    per_document = torch.tensor(margin, dtype=F64) if isinstance(margin, list) else margin
    pairs = fstep.find_pairs(PAIR, CHOSEN, weights)
    loss, m = fstep.bradley_terry_loss(rewards, pairs, margin=per_document, center=center)
    value, want = 0.0, [0.0] * 6
    for c, r in ROWS[:2]:
        w, z = float(weights[c]), SUMS[c] - SUMS[r] - (margin[c] if isinstance(margin, list) else margin)
        value += w * (-math.log(sigmoid(z)) + center * (SUMS[c] + SUMS[r]) ** 2)
        want[c] = w * (-sigmoid(-z) + 2 * center * (SUMS[c] + SUMS[r]))
        want[r] = w * (sigmoid(-z) + 2 * center * (SUMS[c] + SUMS[r]))
    assert loss.num.item() == pytest.approx(value, rel=1e-13) and loss.den == 3
    assert torch.autograd.grad(loss.num, rewards)[0].tolist() == pytest.approx(want, rel=1e-12)
    assert m["accuracy"].num == 3 and m["reward_margin"].num.item() == pytest.approx(2 * 1.5 + 1.65)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: fstep.dpo_loss(sums(), p, beta=0.0), "dpo_loss: beta is 0.0; pass a positive number"),
        (lambda p: fstep.ipo_loss(sums(), p, beta=-1), "ipo_loss: beta is -1"),
        (lambda p: fstep.kto_loss(sums(), CHOSEN, beta=0, kl=0.0), "kto_loss: beta is 0"),
        (lambda p: fstep.dpo_loss(sums(), p, beta=1, label_smoothing=0.6), "dpo_loss: label_smoothing is 0.6; pass a prob"),
        (lambda p: fstep.orpo_loss(sums(1.0, 1.0), p, beta=1), r"orpo_loss: the first argument is a Ratio of \(\) and \(\)"),
        (lambda p: fstep.kto_loss(sums(), CHOSEN[:5], beta=1, kl=0.0), r"kto_loss: chosen is \(5,\) for 6 documents"),
        (lambda p: fstep.kto_loss(sums(), CHOSEN, beta=1, kl=torch.ones(6)), r"kto_loss: kl has shape \(6,\); pass one num"),
        (
            lambda p: fstep.bradley_terry_loss(sums().num, p, margin=torch.ones(3)),
            r"bradley_terry_loss: margin is \(3,\) for 6 documents",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(fstep.find_pairs(PAIR, CHOSEN))


@every_loss
def test_low_precision_is_summed_in_float32(name: str) -> None:
    x = Ratio(torch.tensor(CASES[name][2], dtype=torch.bfloat16), torch.tensor(COUNTS, dtype=torch.bfloat16))
    loss, metrics = CASES[name][0](x, fstep.find_pairs(PAIR, CHOSEN))
    assert {r.num.dtype for r in (loss, *metrics.values())} | {loss.den.dtype} == {torch.float32}
