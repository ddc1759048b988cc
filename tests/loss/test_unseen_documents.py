"""Losses of whole answers and of distributions, on random documents beside loops that know their papers only."""

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
Oracle = Callable[[Any], Tensor]


@dataclasses.dataclass
class Case:
    """Documents with (place, weight) of the tokens that count; who is a pair with whom: (chosen, rejected, weight)."""

    docs: fstep.Docs
    logp: Tensor
    ref: Tensor
    answers: list[list[tuple[int, float]]]
    pairs: list[tuple[int, int, float]]


def draw(seed: int) -> Case:
    """Pairs in any order, numbered in any way: of one the chosen answer is masked, of one both, one weighs 0."""
    g = torch.Generator().manual_seed(2000 + seed)
    order = torch.randperm(12, generator=g).tolist()
    lengths = [2, 5, 3, 6, 4, 4, 7, 1, 2, 2, 3, 5]
    pair, chosen, weight = [0] * 12, [False] * 12, [0.0] * 12
    pairs = []
    for number, name in enumerate([-3, 10**12, 0, 8, 7, -1]):
        c, r = order[2 * number], order[2 * number + 1]
        pair[c] = pair[r] = name
        chosen[c], w = True, [1.0, 0.5, 2.0, 1.0, 1.0, 0.0][number]
        weight[c], weight[r] = w, 9.0  # that of the chosen one is taken
        pairs.append((c, r, w))
    off = {order[6], order[8], order[9]}
    weights = [
        (0.5 + torch.rand(n, generator=g, dtype=F64)) * (torch.rand(n, generator=g) < 0.8) * (i not in off)
        for i, n in enumerate(lengths)
    ]
    fields = {"pair": pair, "chosen": chosen, "weight": torch.tensor(weight, dtype=F64)}
    docs = fstep.make_docs([[0] * n for n in lengths], weights=weights, per_document=fields)
    size = sum(lengths)
    logp, ref = (-0.05 - 2 * torch.rand(size, generator=g, dtype=F64) for _ in range(2))
    junk = torch.tensor([-math.inf, math.nan, math.inf], dtype=F64).repeat(size)[:size]
    logp, ref = (torch.where(docs.weights == 0, junk.roll(k), x) for k, x in ((0, logp), (1, ref)))
    answers, start = [], 0
    for n in lengths:
        answers.append([(t, float(docs.weights[t])) for t in range(start, start + n) if docs.weights[t] != 0])
        start += n
    there = [(c, r, w) for c, r, w in pairs if answers[c] and answers[r] and w]
    assert 0 < len(there) < 5 and any(len(a) == 1 for a in answers)
    return Case(docs, logp, ref, answers, there)


def packed(case: Case, x: Tensor) -> tuple[fstep.Packed, fstep.Pairs]:
    """Pack the log probabilities of the documents' tokens, so that they come to be where the labels are."""
    row = fstep.pack_thd(dataclasses.replace(case.docs, targets={"logp": x, "ref": case.ref}), multiple_of=8)
    which = row.per_document
    return row, fstep.find_pairs(which["pair"], which["chosen"], which["weight"])


def sums(case: Case, x: Tensor, minus_ref: bool) -> tuple[fstep.Ratio, fstep.Packed, fstep.Pairs]:
    row, pairs = packed(case, x)
    values = row.targets["logp"] - row.targets["ref"] if minus_ref else row.targets["logp"]
    return fstep.cp_sequence_sums(values, row, axis=fstep.Mesh().cp), row, pairs


def check(x: Tensor, loss: fstep.Ratio, want: Tensor, weight: float) -> None:
    (got,), (slope,) = (torch.autograd.grad(y, x) for y in (loss.mean(), want))
    torch.testing.assert_close(loss.mean(), want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got, slope, rtol=1e-11, atol=1e-13)
    assert float(loss.den) == pytest.approx(weight, rel=1e-14) and slope.abs().sum() > 0


def log_sigmoid(z: Tensor) -> Tensor:
    return -(1 + (-z).exp()).log()


PREFERENCES: dict[str, tuple[bool, Callable[[fstep.Ratio, fstep.Pairs], Any], Callable[..., Tensor]]] = {
    # name: of log pi - log ref?, ours, theirs of (sum, mean) of the chosen and of the rejected answer
    "dpo": (True, lambda s, p: fstep.dpo_loss(s, p, beta=0.3), lambda a, b: -log_sigmoid(0.3 * (a[0] - b[0]))),
    "cdpo": (
        True,
        lambda s, p: fstep.dpo_loss(s, p, beta=0.3, label_smoothing=0.2),
        lambda a, b: -0.8 * log_sigmoid(0.3 * (a[0] - b[0])) - 0.2 * log_sigmoid(0.3 * (b[0] - a[0])),
    ),
    "ipo": (True, lambda s, p: fstep.ipo_loss(s, p, beta=0.2), lambda a, b: (a[0] - b[0] - 2.5) ** 2),
    "ipo, mean": (True, lambda s, p: fstep.ipo_loss(s, p, beta=0.2, average=True), lambda a, b: (a[1] - b[1] - 2.5) ** 2),
    "simpo": (
        False,
        lambda s, p: fstep.simpo_loss(s, p, beta=2.0, margin=0.5),
        lambda a, b: -log_sigmoid(2 * (a[1] - b[1]) - 0.5),
    ),
    "orpo": (
        False,
        lambda s, p: fstep.orpo_loss(s, p, beta=0.6),
        lambda a, b: -a[1] - 0.6 * log_sigmoid(a[1] - b[1] + ((1 - b[1].exp()) / (1 - a[1].exp())).log()),
    ),
    "nll": (False, lambda s, p: (fstep.chosen_nll(s, p), {}), lambda a, b: -a[1]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str, seed: int) -> None:
    relative, ours, theirs = PREFERENCES[name]
    case = draw(seed)
    x = case.logp.clone().requires_grad_()
    ratio, _, pairs = sums(case, x, relative)

    def both(i: int) -> tuple[Tensor, Tensor]:
        total = sum((w * (x[t] - (case.ref[t] if relative else 0)) for t, w in case.answers[i]), torch.zeros((), dtype=F64))
        return total, total / math.fsum(w for _, w in case.answers[i])

    terms = [w * theirs(both(c), both(r)) for c, r, w in case.pairs]
    every = math.fsum(w for *_, w in case.pairs)
    loss, metrics = ours(ratio, pairs)
    if metrics:
        part, beta = (0, 0.3 if "dpo" in name else 0.2) if relative else (1, 2.0 if name == "simpo" else 0.6)
        part = 1 if name == "ipo, mean" else part
        margins = [(w, beta * float((both(c)[part] - both(r)[part]).detach())) for c, r, w in case.pairs]
        assert float(metrics["reward_margin"].mean()) == pytest.approx(sum(w * m for w, m in margins) / every, rel=1e-11)
        assert float(metrics["accuracy"].mean()) == pytest.approx(sum(w for w, m in margins if m > 0) / every, rel=1e-12)
    check(x, loss, torch.stack(terms).sum() / every, every)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kl", [-0.7, 0.4])
def test_kto(kl: float, seed: int) -> None:
    case = draw(seed)
    x = case.logp.clone().requires_grad_()
    ratios, row, _ = sums(case, x, True)
    mean = fstep.kto_kl(ratios)
    loss, _ = fstep.kto_loss(ratios, row.per_document["chosen"], beta=0.3, kl=kl, desirable=1.2, undesirable=0.7)
    terms, total = [], 0.0
    for answer, good in zip(case.answers, case.docs.per_document["chosen"].tolist(), strict=True):
        if answer:
            z = torch.stack([w * (x[t] - case.ref[t]) for t, w in answer]).sum()
            total += float(z.detach())
            z = 0.3 * (z - max(kl, 0.0))
            terms.append(1.2 * (1 - 1 / (1 + (-z).exp())) if good else 0.7 * (1 - 1 / (1 + z.exp())))
    assert float(mean.num) == pytest.approx(total, rel=1e-12) and float(mean.den) == len(terms)
    check(x, loss, torch.stack(terms).sum() / len(terms), len(terms))


@pytest.mark.parametrize("seed", SEEDS)
def test_bradley_terry(seed: int) -> None:
    case = draw(seed)
    row, pairs = packed(case, case.logp)
    g = torch.Generator().manual_seed(seed)
    at = torch.randn(len(row.tokens), generator=g, dtype=F64).requires_grad_()
    margin = torch.rand(12, generator=g, dtype=F64)
    ends, start = [], 0
    for n in case.docs.lengths.tolist():
        ends.append(start + n - 1)
        start += -(-n // 8) * 8  # each is filled up to a multiple of 8
    loss, _ = fstep.bradley_terry_loss(
        fstep.cp_sequence_last(at, row, axis=fstep.Mesh().cp), pairs, margin=margin, center=0.1
    )
    which, given = case.docs.per_document, []
    for i in range(12):
        if which["chosen"][i] and which["weight"][i]:
            (j,) = [j for j in range(12) if j != i and which["pair"][j] == which["pair"][i]]
            given.append((at[ends[i]], at[ends[j]], float(which["weight"][i]), float(margin[i])))
    terms = [w * (-log_sigmoid(c - r - m) + 0.1 * (c + r) ** 2) for c, r, w, m in given]
    every = math.fsum(w for *_, w, _ in given)
    check(at, loss, torch.stack(terms).sum() / every, every)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [0, 1, 3], ids=lambda k: f"top {k}" if k else "full")
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_distill(divergence: Any, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(3000 + seed)
    h, w = torch.randn(7, 4, generator=g, dtype=F64), torch.randn(6, 4, generator=g, dtype=F64)
    th, tw = torch.randn(7, 3, generator=g, dtype=F64), 2 * torch.randn(6, 3, generator=g, dtype=F64)
    weights = torch.rand(7, generator=g, dtype=F64) * torch.tensor([1, 0, 1, 1, 0, 1, 1])
    h[1], th[4], th[1], h[4] = math.nan, -math.inf, math.inf, math.nan
    h, w = h.requires_grad_(), w.requires_grad_()
    temperature, beta = (0.7, 1.5)[seed % 2], (0.3, 0.8)[seed // 2]
    options: Any = {"divergence": divergence, "temperature": temperature, "beta": beta}
    total = torch.zeros((), dtype=F64)
    top: list[list[tuple[int, float]]] = [[(0, math.nan)] * k for _ in range(7)]
    for t in range(7):
        if weights[t] == 0:
            continue
        s, p = ([x[t] @ y[v] / temperature for v in range(6)] for x, y in ((h, w), (th, tw)))
        s, p = ([y.exp() / sum(z.exp() for z in x) for y in x] for x in (s, p))
        if k:
            best = sorted(range(6), key=lambda v: -float(p[v].detach()))[:k]
            top[t] = [(v, math.log(p[v])) for v in best]
            s, p = ([*(x[v] for v in best), sum(x[v] for v in range(6) if v not in best)] for x in (s, p))
        m = [beta * b + (1 - beta) * a for a, b in zip(s, p, strict=True)]

        def kl(a: list[Tensor], b: list[Tensor]) -> Tensor:
            return torch.stack([x * (x / y).log() for x, y in zip(a, b, strict=True)]).sum()

        found = {"forward": lambda: kl(p, s), "reverse": lambda: kl(s, p)}  # noqa: B023
        d = found[divergence]() if divergence in found else beta * kl(p, m) + (1 - beta) * kl(s, m)
        total = total + float(weights[t]) * d
    if k:
        ids = torch.tensor([[v for v, _ in row] for row in top])
        logprobs = torch.tensor([[p for _, p in row] for row in top], dtype=F64)
        loss = fstep.topk_distill_loss(h, w, ids, logprobs, weights, **options)
    else:
        loss = fstep.distill_loss(h, w, th, tw, weights, **options)
    want = total / weights.sum()
    torch.testing.assert_close(loss.mean(), want, rtol=1e-12, atol=0)
    for x in (h, w):
        (got,), (slope,) = (torch.autograd.grad(y, x, retain_graph=True) for y in (loss.mean(), want))
        counted = slice(None) if x is w else weights != 0
        torch.testing.assert_close(got[counted], slope[counted], rtol=1e-10 if k else 1e-11, atol=1e-13)
        assert x is w or not got[weights == 0].any()


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_a_rejected_answer_that_cannot_be(loss: str) -> None:
    sums = torch.tensor([-1.0, -math.inf, -2.0, -1.0], dtype=F64).requires_grad_()
    pairs = fstep.find_pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0]))
    found, _ = PREFERENCES[loss][1](fstep.Ratio(sums, torch.ones(4, dtype=F64)), pairs)
    alone, _ = PREFERENCES[loss][1](
        fstep.Ratio(sums[2:], torch.ones(2, dtype=F64)), fstep.find_pairs(torch.tensor([0, 0]), torch.tensor([1, 0]))
    )
    chosen_term = 1.0 if loss == "orpo" else 0.0  # -log sigmoid(inf) is 0
    torch.testing.assert_close(found.num, alone.num + chosen_term, rtol=1e-14, atol=0)
    (slope,) = torch.autograd.grad(found.num, sums)
    assert slope.isfinite().all() and slope[1] == 0
