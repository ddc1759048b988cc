"""Losses of tokens on random documents beside oracles that know their papers only: loops over tokens, a case at a time.

Mixed in everywhere: documents that are masked or have no answer, answers of one token, what is no number where nothing
counts, ratios on the bounds of the clip and far past them, groups of equal rewards, prompts numbered in any order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep

F64 = torch.float64
SEEDS = range(4)
CONSTANTS = ("advantages", "importance", "old", "ref", "generator", "value", "old_value", "returns", "reward")
Metrics = dict[str, float]


@dataclasses.dataclass
class Case:
    """Documents, numbers of their tokens, and where tokens count: (place, weight), a list for each document."""

    docs: fstep.Docs
    x: dict[str, Tensor]
    answers: list[list[tuple[int, float]]]
    rewards: list[float]
    groups: list[int]

    @property
    def counted(self) -> list[tuple[int, float]]:
        return [token for answer in self.answers for token in answer]


def draw(seed: int, whole: bool = False) -> Case:
    """Draw a case; with ``whole`` weights are 0 and 1, as in the papers."""
    g = torch.Generator().manual_seed(1000 + seed)
    lengths = torch.tensor([1, 2, 2, 4, 7, 5, 3, 6])[torch.randperm(8, generator=g)].tolist()
    groups = torch.tensor([-4, 9, -4, 0, 9, -4, 9, 10**12])[torch.randperm(8, generator=g)].tolist()
    rewards = [0.1 if group == 9 else float(torch.randint(-2, 3, (), generator=g)) / 3 for group in groups]
    masked = next(i for i in range(8) if lengths[(i + seed) % 8] > 3)
    weights = []
    for i, n in enumerate(lengths):
        w = (torch.rand(n, generator=g, dtype=F64) < 0.7).double()
        w[-1] = 1
        weights.append(w * (i != (masked + seed) % 8) * (1 if whole else 0.5 + torch.rand(n, generator=g, dtype=F64)))
    docs = fstep.make_docs([[0] * n for n in lengths], weights=weights)
    size = sum(lengths)
    x = {name: torch.randn(size, generator=g, dtype=F64) for name in CONSTANTS}
    x["logp"] = -3 * torch.rand(size, generator=g, dtype=F64)
    for name in ("old", "ref", "generator"):
        x[name] = x["logp"] + 0.6 * x[name]
    # Every third exactly on a bound of the clip at [1/2, 2], or without a change, or far away.
    special = torch.tensor([0.5, 2.0, 1.0, 3.0, 1e-30, 1e30], dtype=F64).log()
    x["log_ratio"] = torch.where(torch.rand(size, generator=g) < 0.5, special.repeat(9)[:size], x["logp"] - x["old"])
    x["importance"] = x["importance"].exp()
    assert (x["log_ratio"].exp() == 0.5).any() and (x["log_ratio"].exp() == 2).any()
    nowhere = docs.weights == 0
    junk = torch.tensor([math.nan, -math.inf, math.inf], dtype=F64).repeat(size)[:size]
    x = {name: torch.where(nowhere, junk, v) for name, v in x.items()}
    answers, start = [], 0
    for n in lengths:
        answers.append([(t, float(docs.weights[t])) for t in range(start, start + n) if docs.weights[t] != 0])
        start += n
    assert any(not a for a in answers) and any(len(a) == 1 for a in answers)
    return Case(docs, x, answers, rewards, groups)


def check(case: Case, name: str, ours: Callable[[Tensor], Any], oracle: Callable[[Tensor], Tensor]) -> Any:
    """Compare the mean and its gradient; where nothing counts the gradient is 0. Returns our metrics."""
    x = case.x[name].clone().requires_grad_()
    found = ours(x)
    loss, metrics = found if not isinstance(found, fstep.Ratio) else (found, {})
    value = loss.mean()
    (got,) = torch.autograd.grad(value, x)
    want = oracle(x)
    (slope,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got, slope, rtol=1e-11, atol=1e-13)
    assert slope.abs().sum() > 0
    return {k: float(m.mean()) for k, m in metrics.items()}


def surrogate(x: Tensor, a: float, low: float, high: float, dual: float = math.inf) -> Tensor:
    """One token's clipped objective, by what happens to it."""
    r = x.exp()
    if a >= 0:
        return r * a if r <= 1 + high else torch.tensor((1 + high) * a, dtype=F64)
    if r < 1 - low:
        return torch.tensor((1 - low) * a, dtype=F64)
    return r * a if r <= dual else torch.tensor(dual * a, dtype=F64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.5, 1.0, 3.0), (0.5, 0.25, 2.0), (0.1, 1.0, 1e9)])
def test_clipped(seed: int, low: float, high: float, dual: float) -> None:
    case = draw(seed)
    a, k, tokens = case.x["advantages"].tolist(), case.x["importance"].tolist(), case.counted
    counts = fstep.document_weights(case.docs)

    def oracle(x: Tensor) -> Tensor:
        total = torch.stack([-w * k[t] * surrogate(x[t], a[t], low, high, dual) for t, w in tokens])
        return total.sum() / sum(1 for answer in case.answers if answer)

    def ours(x: Tensor) -> Any:
        return fstep.clipped_loss(
            x,
            case.x["advantages"],
            case.docs.weights,
            low=low,
            high=high,
            dual=dual,
            importance=case.x["importance"],
            counts=counts,
        )

    metrics = check(case, "log_ratio", ours, oracle)
    x = case.x["log_ratio"]
    r = x.exp().tolist()
    every = sum(w for _, w in tokens)
    for name, hit in {
        "clip_high": [w for t, w in tokens if a[t] > 0 and r[t] > 1 + high],
        "clip_low": [w for t, w in tokens if a[t] < 0 and r[t] < 1 - low],
        "clip_dual": [w for t, w in tokens if a[t] < 0 and r[t] > dual],
        "ratio": [w * r[t] for t, w in tokens],
        "kl_old": [w * (r[t] - 1 - float(x[t])) for t, w in tokens],
    }.items():
        assert metrics[name] == pytest.approx(math.fsum(hit) / every, rel=1e-12), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize(("estimator", "options"), [("k1", {}), ("k2", {}), ("k3", {}), ("k3", {"bound": 0.5, "cap": 0.1})])
def test_kl(estimator: Any, options: dict[str, float], ratio: bool, seed: int) -> None:
    case, bound, cap = draw(seed), options.get("bound", 20.0), options.get("cap", math.inf)
    ref, old = case.x["ref"], case.x["old"]

    def k(d: Tensor) -> Tensor:
        if estimator == "k1":
            return d
        if estimator == "k2":
            return d * d / 2
        d = d if abs(d) <= bound else d.sign() * bound  # a sign has no gradient
        found = (-d).exp() - 1 + d
        return found if found <= cap else 0 * d + cap

    def oracle(x: Tensor) -> Tensor:
        terms = [w * k(x[t] - ref[t]) * ((x[t] - old[t]).exp() if ratio else 1) for t, w in case.counted]
        return torch.stack(terms).sum() / math.fsum(w for _, w in case.counted)

    def ours(x: Tensor) -> Any:
        log_ratio = x - old if ratio else None
        return fstep.kl_loss(x, ref, case.docs.weights, estimator=estimator, log_ratio=log_ratio, **options)

    check(case, "logp", ours, oracle)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("outside", ["clip", "zero"])
@pytest.mark.parametrize("sequence", [False, True])
def test_importance(sequence: bool, outside: Any, seed: int) -> None:
    case, low, high = draw(seed), 0.5, 2.0
    d = case.x["log_ratio"] if not sequence else case.x["old"] - case.x["generator"]
    given = fstep.cp_sequence_log_ratio(d, case.docs, mean=False) if sequence else d
    weights = case.docs.weights
    found, metrics = fstep.importance_weights(given.clone().requires_grad_(), weights, low=low, high=high, outside=outside)
    assert not found.requires_grad
    below = above = total = 0.0
    for answer in case.answers:
        for t, w in answer:
            f = float(torch.stack([d[s] for s, _ in answer]).sum().exp() if sequence else d[t].exp())
            kept = f if low <= f <= high else 0.0 if outside == "zero" else low if f < low else high
            assert float(found[t]) == pytest.approx(kept, rel=1e-13, abs=0)
            below, above, total = below + w * (f < low), above + w * (f > high), total + w
    assert found[weights == 0].isfinite().all()
    assert float(metrics["importance_low"].mean()) == pytest.approx(below / total, rel=1e-13)
    assert float(metrics["importance_high"].mean()) == pytest.approx(above / total, rel=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (0.0, 1.0)])
def test_values(gamma: float, lam: float, seed: int) -> None:
    case = draw(seed)
    value, reward = (case.x[name].tolist() for name in ("value", "reward"))
    last = torch.randn(len(case.answers), generator=torch.Generator().manual_seed(seed), dtype=F64)
    advantages, returns = fstep.gae(case.x["reward"], case.x["value"], case.docs, gamma=gamma, lam=lam, bootstrap=last)
    for answer, end in zip(case.answers, last.tolist(), strict=True):
        deltas = [
            reward[t] - value[t] + gamma * (value[answer[i + 1][0]] if i + 1 < len(answer) else end)
            for i, (t, _) in enumerate(answer)
        ]
        for i, (t, _) in enumerate(answer):
            want = math.fsum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:]))
            assert float(advantages[t]) == pytest.approx(want, rel=1e-12, abs=1e-13)
            assert float(returns[t]) == pytest.approx(want + value[t], rel=1e-12, abs=1e-13)
    assert not advantages[case.docs.weights == 0].any() and not returns[case.docs.weights == 0].any()

    old, goal = case.x["old_value"].tolist(), case.x["returns"].tolist()

    def square(v: Tensor, t: int) -> Tensor:
        kept = (
            v
            if old[t] - 0.3 <= v <= old[t] + 0.3
            else torch.tensor(old[t] + math.copysign(0.3, float(v.detach()) - old[t]), dtype=F64)
        )
        return max((v - goal[t]) ** 2, (kept - goal[t]) ** 2) / 2

    def oracle(x: Tensor) -> Tensor:
        return torch.stack([w * square(x[t], t) for t, w in case.counted]).sum() / math.fsum(w for _, w in case.counted)

    def ours(x: Tensor) -> Any:
        return fstep.value_loss(x, case.x["returns"], case.docs.weights, old_values=case.x["old_value"], clip=0.3)

    check(case, "value", ours, oracle)


@pytest.mark.parametrize("value", [0.1, 0.7, 100.1])
def test_equal_values_have_no_advantage(value: float) -> None:
    case = torch.full((1001,), value)
    case[7] = math.inf
    found = fstep.whiten(case, torch.arange(1001.0) % 7)
    assert found.dtype == torch.float32 and found.abs().max() < 1e-9 * value


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_that_have_hardly_moved_keep_their_gradient(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    old, x, returns = (torch.randn(500, generator=g, dtype=dtype) * scale for scale in (0.05, 0.01, 0.01))
    x, ones = x.requires_grad_(), torch.ones(500, dtype=dtype)  # small numbers as differences of larger ones are rounded
    loss, metrics = fstep.value_loss(x, returns, ones, old_values=old, clip=0.3)
    assert metrics["value_clip"].num == 0
    torch.testing.assert_close(torch.autograd.grad(loss.num, x)[0], (x - returns).detach(), rtol=0, atol=0)
