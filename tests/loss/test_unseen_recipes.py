"""The algorithms as the reference page writes them, on random documents, beside loops that write down their papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from tests.loss.test_unseen import F64, SEEDS, Case, check, draw, surrogate


def advantages(case: Case, leave_out: bool = False, scaled: bool = False) -> list[float]:
    """A document's advantage, from the rewards of its prompt alone."""
    found = []
    for i, group in enumerate(case.groups):
        same = [r for r, g in zip(case.rewards, case.groups, strict=True) if g == group]
        others = [r for j, (r, g) in enumerate(zip(case.rewards, case.groups, strict=True)) if g == group and j != i]
        if not others or all(r == same[0] for r in same):
            found.append(0.0)
            continue
        mean = math.fsum(same) / len(same)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in same) / (len(same) - 1))
        base = math.fsum(others) / len(others) if leave_out else mean
        found.append((case.rewards[i] - base) / (std + 1e-6 if scaled else 1))
    return found


def mean_of_answers(case: Case, term: Callable[[int, int], Any]) -> Any:
    rows = [(i, a) for i, a in enumerate(case.answers) if a]
    return sum(sum(term(i, t) for t, _ in a) / len(a) for i, a in rows) / len(rows)


def recipes(case: Case) -> dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]]:
    """Of each algorithm: what the reference page says to call, and what its paper says."""
    docs, old = case.docs, case.x["old"]
    w, each, n = docs.weights, fstep.document_weights(docs), len(case.counted)
    rewards, groups = torch.tensor(case.rewards, dtype=F64), torch.tensor(case.groups)
    scaled, plain, others = advantages(case, scaled=True), advantages(case), advantages(case, leave_out=True)
    lively = sum(1 for a in case.answers if a)

    def spread(**options: Any) -> Tensor:
        return fstep.spread_documents(fstep.group_advantages(rewards, groups, **options), docs)

    def over_tokens(term: Callable[[int, int], Any]) -> Any:
        return sum(term(i, t) for i, answer in enumerate(case.answers) for t, _ in answer)

    def grpo(x: Tensor) -> Any:
        loss, metrics = fstep.clipped_loss(x - old, spread(), each)
        return fstep.Ratio(loss.num + 0.04 * fstep.kl_loss(x, case.x["ref"], each).num, loss.den), metrics

    def paper_grpo(x: Tensor) -> Tensor:
        def term(i: int, t: int) -> Tensor:
            q = (case.x["ref"][t] - x[t]).exp()
            return -surrogate(x[t] - old[t], scaled[i], 0.2, 0.2) + 0.04 * (q - q.log() - 1)

        return mean_of_answers(case, term)

    def paper_gspo(x: Tensor) -> Tensor:
        def term(i: int, _: int) -> Tensor:
            s = torch.stack([x[t] - old[t] for t, _ in case.answers[i]]).mean()
            return -surrogate(s, scaled[i], 0.4, 0.5)

        return mean_of_answers(case, term)

    returns = torch.zeros(len(w), dtype=F64)  # REINFORCE++: k1 in the rewards, and what is to come from a token on
    for i, answer in enumerate(case.answers):
        rest = case.rewards[i]
        for t, _ in reversed(answer):
            rest -= 0.1 * float(old[t] - case.x["ref"][t])
            returns[t] = rest
    listed = torch.stack([returns[t] for t, _ in case.counted])
    normal = ((returns - listed.mean()) / (listed.var(correction=0) + 1e-8).sqrt()).tolist()

    def reinforce_pp(x: Tensor) -> Any:
        kl = torch.where(w != 0, old - case.x["ref"], 0)
        r = fstep.spread_documents(rewards, docs, last=True) - 0.1 * kl
        return fstep.clipped_loss(x - old, fstep.whiten(fstep.gae(r, torch.zeros_like(r), docs)[1], w), w)

    return {
        "grpo": (grpo, paper_grpo),
        "dr_grpo": (
            lambda x: fstep.clipped_loss(x - old, spread(scale=None), w, counts=16 * each),
            lambda x: over_tokens(lambda i, t: -surrogate(x[t] - old[t], plain[i], 0.2, 0.2)) / (16 * lively),
        ),
        "dapo": (
            lambda x: fstep.clipped_loss(x - old, spread(), w, low=0.2, high=0.28),
            lambda x: over_tokens(lambda i, t: -surrogate(x[t] - old[t], scaled[i], 0.2, 0.28)) / n,
        ),
        "gspo": (
            lambda x: fstep.clipped_loss(fstep.cp_sequence_log_ratio(x - old, docs), spread(), each, low=0.4, high=0.5),
            paper_gspo,
        ),
        "cispo": (
            lambda x: fstep.cispo_loss(x, x - old, spread(), w, high=0.3),
            lambda x: over_tokens(lambda i, t: -min(math.exp(float((x[t] - old[t]).detach())), 1.3) * scaled[i] * x[t]) / n,
        ),
        "rloo": (
            lambda x: fstep.reinforce_loss(x, spread(baseline="others", scale=None), w, counts=each),
            lambda x: over_tokens(lambda i, t: -others[i] * x[t]) / lively,
        ),
        "reinforce++": (
            reinforce_pp,
            lambda x: over_tokens(lambda _, t: -surrogate(x[t] - old[t], normal[t], 0.2, 0.2)) / n,
        ),
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"])
def test_recipes(name: str, seed: int) -> None:
    case = draw(seed, whole=True)
    check(case, "logp", *recipes(case)[name])
