"""Every algorithm, however the batch is cut: one loss, one gradient, one set of metrics.

The oracle goes through documents and tokens one by one and writes each algorithm down as its paper does. What it is
compared with are microbatches, other orders of documents, padding, and ranks of dp and cp; one document counts nowhere.
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
import fstep.testing

F64 = torch.float64
LENGTHS, GROUPS, VOCAB, LONGEST = [7, 3, 1, 12, 2, 5, 6], [0, 0, 0, 1, 1, 1, 2], 5, 16
FIELDS = ("old", "ref", "generator", "value", "returns")
Scored = tuple[fstep.Ratio, dict[str, fstep.Ratio]]


def documents() -> fstep.Docs:
    key = fstep.Key.seed(17)
    tokens = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(LENGTHS)]
    weights = [(key.fold_in(i).uniform((n,), dtype=F64) > 0.25).double() for i, n in enumerate(LENGTHS)]
    weights[5][:] = 0
    rewards = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 9.0, 1.0], dtype=F64)
    docs = fstep.make_docs(tokens, weights=weights, per_document={"reward": rewards})
    nowhere = docs.weights == 0
    # All of them near what the policy says, so that some tokens are clipped and others not.
    logp = bigrams(make_params())[docs.tokens.roll(1), docs.tokens]
    targets = {k: logp + 0.5 * key.fold_in(50 + i).normal((len(nowhere),), dtype=F64) for i, k in enumerate(FIELDS)}
    targets["advantages"] = fstep.spread_documents(fstep.group_advantages(rewards, torch.tensor(GROUPS)), docs)
    targets = {k: x.masked_fill(nowhere, math.nan) for k, x in targets.items()}
    targets["each"] = fstep.document_weights(docs)
    return dataclasses.replace(docs, targets=targets)


def make_params() -> dict[str, Tensor]:
    key = fstep.Key.seed(1)
    return {name: 0.7 * key.fold_in(i).normal((VOCAB, 3), dtype=F64) for i, name in enumerate(("e", "h"))}


def bigrams(params: Any) -> Tensor:
    return (params["e"] @ params["h"].T / 0.7).log_softmax(1)


def score(params: Any, mb: fstep.Packed) -> Tensor:
    """Score with a bigram model at a temperature; infinite where nothing counts."""
    logp = fstep.token_logprobs(fstep.embed(mb.tokens, params["e"]), params["h"], mb.labels, temperature=0.7)
    return logp.masked_fill(mb.weights == 0, -math.inf)


def grpo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    loss, metrics = fstep.clipped_loss(logp - t["old"], t["advantages"], t["each"])
    kl = fstep.kl_loss(logp, t["ref"], t["each"])
    return fstep.Ratio(loss.num + 0.04 * kl.num, loss.den), {**metrics, "kl_ref": kl.detach()}


def dr_grpo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    return fstep.clipped_loss(logp - t["old"], t["advantages"], mb.weights, counts=LONGEST * t["each"])


def dapo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    factor, metrics = fstep.importance_weights(t["old"] - t["generator"], mb.weights, low=0.7, high=1.5, outside="zero")
    loss, more = fstep.clipped_loss(logp - t["old"], t["advantages"], mb.weights, high=0.28, dual=1.4, importance=factor)
    return loss, {**metrics, **more}


def gspo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    ratio = fstep.cp_sequence_log_ratio(logp - t["old"], mb, axis=mesh.cp)
    drift = fstep.cp_sequence_log_ratio(t["old"] - t["generator"], mb, mean=False, axis=mesh.cp)
    factor, metrics = fstep.importance_weights(drift, t["each"], high=1.1)
    loss, more = fstep.clipped_loss(ratio, t["advantages"], t["each"], low=0.1, high=0.1, importance=factor)
    return loss, {**metrics, **more}


def cispo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    return fstep.cispo_loss(logp, logp - t["old"], t["advantages"], mb.weights, high=0.3)


def rloo(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    advantages = fstep.spread_documents(mb.per_document["reward"], mb)
    return fstep.reinforce_loss(logp, advantages, mb.weights, counts=mb.targets["each"]), {}


def value(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    return fstep.value_loss(logp, mb.targets["returns"], mb.weights, old_values=mb.targets["value"], clip=0.6)


def k3_drawn_from_old(logp: Tensor, mb: fstep.Packed, mesh: fstep.Mesh) -> Scored:
    t = mb.targets
    return fstep.kl_loss(logp, t["ref"], mb.weights, log_ratio=logp - t["old"], bound=0.6, cap=0.15), {}


ALGORITHMS = {f.__name__: f for f in (grpo, dr_grpo, dapo, gspo, cispo, rloo, value, k3_drawn_from_old)}


def oracle(name: str, params: Any, docs: fstep.Docs) -> tuple[Tensor, float]:
    """Return the mean loss and what it was divided by, from loops over documents and their tokens."""
    table = bigrams(params)
    num, den, start = torch.zeros((), dtype=F64), 0.0, 0
    for i, n in enumerate(LENGTHS):
        at = [t for t in range(start, start + n) if docs.weights[t] != 0]
        start += n
        if not at:
            continue
        tokens = docs.tokens.tolist()
        p = {t: table[tokens[t - 1], tokens[t]] for t in at}
        of = {k: {t: float(x[t]) for t in at} for k, x in docs.targets.items()}
        group = [float(r) for r, g in zip(docs.per_document["reward"], GROUPS, strict=True) if g == GROUPS[i]]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / max(len(group) - 1, 1))
        a = (float(docs.per_document["reward"][i]) - mean) / (std + 1e-6)
        parts = []
        if name == "gspo":
            s = torch.stack([p[t] - of["old"][t] for t in at]).mean().exp()
            c = min(math.exp(sum(of["old"][t] - of["generator"][t] for t in at)), 1.1)
            num = num - c * torch.minimum(s * a, s.clamp(0.9, 1.1) * a)
            den += 1
            continue
        for t in at:
            r = (p[t] - of["old"][t]).exp()
            if name in ("grpo", "dr_grpo"):
                term = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
                if name == "grpo":
                    term = term + 0.04 * (math.exp(of["ref"][t]) / p[t].exp() - 1 - (of["ref"][t] - p[t]))
            elif name == "dapo":
                k = math.exp(of["old"][t] - of["generator"][t])
                best = torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
                best = torch.clamp(best, min=1.4 * a) if a < 0 else best
                term = -best * (k if 0.7 <= k <= 1.5 else 0.0)
            elif name == "cispo":
                term = -min(float(r.detach()), 1.3) * a * p[t]
            elif name == "rloo":
                term = -float(docs.per_document["reward"][i]) * p[t]
            elif name == "value":
                old, target = of["value"][t], of["returns"][t]
                near = old + (p[t] - old).clamp(-0.6, 0.6)
                term = torch.maximum((p[t] - target) ** 2, (near - target) ** 2) / 2
            else:
                d = (p[t] - of["ref"][t]).clamp(-0.6, 0.6)
                term = r * ((-d).exp() - 1 + d).clamp(max=0.15)
            parts.append(term)
        total = torch.stack(parts).sum()
        if name == "grpo":
            num, den = num + total / len(at), den + 1
        elif name == "dr_grpo":
            num, den = num + total, den + LONGEST
        elif name == "rloo":
            num, den = num + total, den + 1
        else:
            num, den = num + total, den + len(at)
    return num / den, den


def step(docs: fstep.Docs, f: Callable[..., Scored], mesh: fstep.Mesh, num: int, multiple_of: int) -> tuple[Any, Any]:
    own = fstep.divide_documents(docs, axis=mesh.dp)
    parts = fstep.split_microbatches(own, num=num)
    batch = [fstep.cp_shard(fstep.pack_thd(mb, multiple_of=multiple_of), axis=mesh.cp) for mb in parts]

    def loss_fn(params: Any, x: Any, mb: fstep.Packed) -> Scored:
        return f(score(params, mb), mb, mesh)

    loss, grads = fstep.pp_forward_backward(lambda params, x, mb: mb.tokens, loss_fn, make_params(), batch)
    return fstep.finalize_grads(grads, loss, mesh=mesh)


CUTS: dict[str, dict[str, int]] = {
    "whole": {"num": 1},
    "padded": {"num": 1, "multiple_of": 8},
    "3 microbatches": {"num": 3},
    "more microbatches than documents": {"num": 9},
    "dp": {"num": 2, "dp": 3},
    "cp": {"num": 2, "cp": 2, "multiple_of": 4},
    "dp x cp": {"num": 2, "dp": 2, "cp": 2, "multiple_of": 4},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_against_loops_however_it_is_cut(name: str) -> None:
    docs, f = documents(), ALGORITHMS[name]
    params = {k: v.requires_grad_() for k, v in make_params().items()}
    loss, den = oracle(name, params, docs)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    first: Any = None
    for cut in CUTS.values():
        sizes = {k: v for k, v in cut.items() if k in ("dp", "cp")}
        num, multiple_of = cut["num"], cut.get("multiple_of", 1)
        for found, metrics in fstep.simulate(lambda mesh: step(docs, f, mesh, num, multiple_of), **sizes):  # noqa: B023
            assert metrics["loss"].item() == pytest.approx(float(loss.detach()), rel=1e-12)
            assert metrics["weight"].item() == pytest.approx(den, rel=1e-13)
            fstep.testing.assert_trees_close(found, grads, rtol=1e-12)
            first = first or metrics
            fstep.testing.assert_trees_close(metrics, first, rtol=1e-12, atol=1e-15)
    shuffled = fstep.select_documents(docs, [3, 6, 0, 5, 2, 4, 1])
    fstep.testing.assert_trees_close(step(shuffled, f, fstep.Mesh(), 2, 1)[0], grads, rtol=1e-12)


def test_the_cases_reach_every_branch() -> None:
    """So that the comparison above says something."""
    docs = documents()
    for name, wanted in (
        ("grpo", ("clip_low", "clip_high", "kl_ref")),
        ("dapo", ("clip_low", "clip_high", "clip_dual", "importance_low", "importance_high")),
        ("gspo", ("clip_low", "clip_high", "importance_high")),
        ("cispo", ("clip_high",)),
        ("value", ("value_clip",)),
    ):
        _, metrics = step(docs, ALGORITHMS[name], fstep.Mesh(), 1, 1)
        assert all(0 < metrics[w].item() < 1 for w in wanted), (name, metrics)
