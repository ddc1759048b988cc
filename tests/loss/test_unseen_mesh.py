"""A step of GRPO, of DPO and of distillation with a whole model, at temperature 0.7: the same however the batch is cut.

The oracle scores one document at a time in plain torch with `Dense.logits`, one process, no packing; each loss is its
paper's formula. Beside it: microbatches, another order of the documents, and meshes; then the first step on policy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Mesh, Packed
from fstep_models.dense import Config, Dense
from tests.ops.test_tensor import share

F64, TEMPERATURE, BETA = torch.float64, 0.7, 0.4
MODEL = Dense(
    Config(
        family="qwen3", vocab=37, dim=16, ffn=20, layers=2, heads=4, kv_heads=2, head_dim=4, windows=(0, 0), tied=False,
        rope=fstep.Rope(theta=1000.0, dim=4), qk_norm=True, init_std=0.4,
    )
)  # fmt: skip
PARAMS, TEACHER = (MODEL.init(fstep.Key.seed(i), dtype=F64) for i in (1, 2))
LENGTHS, PAIR = [6, 1, 9, 2, 4, 11, 3, 5], [4, 4, -2, -2, 0, 0, 7, 7]
CHOSEN, GROUPS = [True, False, False, True, True, False, False, True], [5, 5, -1, -1, -1, 3, 3, 5]
REWARDS = [1.0, 0.0, 0.3, 0.1, 0.9, 0.2, 0.2, 0.5]


def make() -> fstep.Docs:
    """One document has a token and no answer, one an answer of one token, one is masked."""
    g = torch.Generator().manual_seed(9)
    tokens = [torch.randint(0, 37, (n,), generator=g) for n in LENGTHS]
    weights = [(torch.rand(n, generator=g) < 0.7).double() for n in LENGTHS]
    for i, w in enumerate(weights):
        w[-1] = float(i != 4)
    weights[4].zero_()
    fields = {"pair": PAIR, "chosen": CHOSEN, "reward": REWARDS, "group": GROUPS}
    docs = fstep.make_docs(tokens, weights=weights, per_document=fields)
    nowhere = docs.weights == 0
    old = torch.cat([scores(PARAMS, docs, i) for i in range(8)])  # near the policy, so that not all is clipped
    noise = torch.randn(2, len(old), generator=g, dtype=F64)
    targets = {"old": (old + 0.2 * noise[0]).detach(), "ref": (old + 0.5 * noise[1]).detach()}
    targets = {name: x.masked_fill(nowhere, math.nan) for name, x in targets.items()}
    advantages = fstep.group_advantages(docs.per_document["reward"], docs.per_document["group"].long()).double()
    targets |= {"advantages": fstep.spread_documents(advantages, docs), "each": fstep.document_weights(docs)}
    teacher = torch.cat([hidden(TEACHER, docs, i).roll(1, 0) for i in range(8)])  # those that predict a token, at it
    return replace(docs, targets=targets | {"teacher": teacher.masked_fill(nowhere[:, None], math.nan)})


def hidden(params: Any, docs: fstep.Docs, i: int) -> Tensor:
    """Normed hidden states of document i, which is alone."""
    row = fstep.pack_thd(replace(fstep.select_documents(docs, [i]), targets={}))
    return MODEL.head(params, MODEL.stage()(params, None, row))[0]


def distributions(params: Any, docs: fstep.Docs, i: int) -> Tensor:
    """Log probabilities over the vocabulary after each of its tokens."""
    return (hidden(params, docs, i) @ params["head"].T / TEMPERATURE).log_softmax(-1)


def scores(params: Any, docs: fstep.Docs, i: int) -> Tensor:
    """Log probability of each token of document i; 0 for the first."""
    start = sum(LENGTHS[:i])
    logp, tokens = distributions(params, docs, i), docs.tokens[start : start + LENGTHS[i]]
    return torch.cat([logp.new_zeros(1), logp[:-1].gather(1, tokens[1:, None])[:, 0]])


def spans(docs: fstep.Docs) -> list[tuple[int, int, list[int]]]:
    """Documents with an answer: number, start, places of the answer's tokens."""
    starts = [sum(LENGTHS[:i]) for i in range(8)]
    found = [(i, s, [t for t in range(LENGTHS[i]) if docs.weights[s + t]]) for i, s in enumerate(starts)]
    return [(i, s, places) for i, s, places in found if places]


def oracle(name: str, docs: fstep.Docs) -> Any:
    t, answers = docs.targets, spans(docs)

    def grpo(params: Any) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for i, start, places in answers:
            logp, whole = scores(params, docs, i), distributions(params, docs, i)
            for p in places:
                a, r = t["advantages"][start + p], (logp[p] - t["old"][start + p]).exp()
                q = (t["ref"][start + p] - logp[p]).exp()
                entropy = -(whole[p - 1].exp() * whole[p - 1]).sum()
                term = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a) + 0.1 * (q - q.log() - 1) - 0.05 * entropy
                total = total + term / len(places)
        return total / len(answers)

    def dpo(params: Any) -> Tensor:
        sums = {i: sum(scores(params, docs, i)[p] - t["ref"][s + p] for p in places) for i, s, places in answers}
        both = [(c, r) for c in sums for r in sums if PAIR[c] == PAIR[r] and CHOSEN[c] > CHOSEN[r]]
        assert 0 < len(both) < 4
        return torch.stack([(1 + (BETA * (sums[r] - sums[c])).exp()).log() for c, r in both]).mean()

    def distill(params: Any) -> Tensor:
        terms = []
        for i, _, places in answers:
            s, p = distributions(params, docs, i), distributions(TEACHER, docs, i).detach()
            terms += [(p[at - 1].exp() * (p[at - 1] - s[at - 1])).sum() for at in places]
        return torch.stack(terms).mean()

    return fstep.value_and_grad({"grpo": grpo, "dpo": dpo, "distill": distill}[name])(PARAMS)


def loss_of(name: str, mesh: Mesh) -> Any:
    def grpo(params: Any, x: Tensor, mb: Packed) -> Any:
        t = mb.targets
        logp, entropies = MODEL.logprobs(params, x, mb, mesh=mesh, temperature=TEMPERATURE, entropy=True)
        loss, metrics = fstep.clipped_loss(logp - t["old"], t["advantages"], t["each"])
        kl, entropy = fstep.kl_loss(logp, t["ref"], t["each"]), fstep.weigh(entropies, t["each"])
        return fstep.Ratio(loss.num + 0.1 * kl.num - 0.05 * entropy.num, loss.den), {**metrics, "kl": kl.detach()}

    def dpo(params: Any, x: Tensor, mb: Packed) -> Any:
        logp = MODEL.logprobs(params, x, mb, mesh=mesh, temperature=TEMPERATURE)
        sums = fstep.cp_sequence_sums(logp - mb.targets["ref"], mb, axis=mesh.cp)
        pairs = fstep.find_pairs(mb.per_document["pair"], mb.per_document["chosen"])
        return fstep.as_partial(fstep.dpo_loss(sums, pairs, beta=BETA), axis=mesh.cp)

    def distill(params: Any, x: Tensor, mb: Packed) -> Any:
        teacher = share(mb.targets["teacher"], mesh), fstep.Shard.cut(TEACHER["head"], axis=mesh.tp, dim=0)
        student = MODEL.head(params, x, mesh=mesh)
        return fstep.tp_distill_loss(*student, *teacher, mb.weights, axis=mesh.tp, temperature=TEMPERATURE)

    return {"grpo": grpo, "dpo": dpo, "distill": distill}[name]


def train(name: str, mesh: Mesh, docs: fstep.Docs, **cut: Any) -> Any:
    multiple = 2 * mesh.cp.size
    parts = fstep.split_microbatches(docs, multiple_of=multiple, axis=mesh.dp, together=docs.per_document["pair"], **cut)
    batch = [fstep.cp_shard(fstep.pack_thd(part, multiple_of=multiple), axis=mesh.cp) for part in parts]
    params = MODEL.part(PARAMS, mesh=mesh)
    loss, grads = fstep.pp_forward_backward(MODEL.stage(mesh), loss_of(name, mesh), params, batch, axis=mesh.pp)
    return fstep.finalize_grads(grads, loss, mesh=mesh)


DOCS = make()
WHOLE = {name: oracle(name, DOCS) for name in ("grpo", "dpo", "distill")}
every_loss = pytest.mark.parametrize("name", WHOLE)


def check(name: str, mesh: Mesh, grads: Any, metrics: Any) -> None:
    value, want = WHOLE[name]
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-10)
    assert all(g.norm() > 1e-4 for g in fstep.tree_leaves(want))
    for g, w in zip(fstep.tree_leaves(grads), fstep.tree_leaves(MODEL.part(want, mesh=mesh)), strict=True):
        assert (fstep.bare(g) - fstep.bare(w)).norm() <= 1e-10 * fstep.bare(w).norm()


@every_loss
@pytest.mark.parametrize("cut", [{"num": 1}, {"num": 3}, {"num": 9}, {"max_tokens": 18}], ids=str)
def test_any_split(name: str, cut: dict[str, int]) -> None:
    check(name, Mesh(), *train(name, Mesh(), DOCS, **cut))


@every_loss
def test_any_order(name: str) -> None:
    order = [7, 2, 4, 0, 6, 1, 5, 3]
    check(name, Mesh(), *train(name, Mesh(), fstep.select_documents(DOCS, order), num=2))


@every_loss
@pytest.mark.parametrize(
    "sizes", [{"dp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2, "cp": 2}, {"dp": 2, "tp": 2}], ids=str
)
def test_any_mesh(name: str, sizes: dict[str, int]) -> None:
    for mesh, found in fstep.simulate(lambda m: (m, train(name, m, DOCS, num=2)), **sizes):
        check(name, mesh, *found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [{}, {"pp": 2}, {"cp": 2}, {"tp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_first_step_on_policy(sizes: dict[str, int], dtype: torch.dtype) -> None:
    """The ratio is exactly 1 to what the mesh itself scored before; the generator is one process with other rows."""
    whole = fstep.cast(PARAMS, dtype)

    def step(mesh: Mesh) -> Any:
        params, multiple = MODEL.part(whole, mesh=mesh), 2 * mesh.cp.size
        batch = []
        for part in fstep.split_microbatches(DOCS, num=2, axis=mesh.dp):
            row, found = fstep.pack_thd(part, multiple_of=multiple), dict(part.targets)
            (score,) = MODEL.score(params, [fstep.cp_shard(row, axis=mesh.cp)], mesh=mesh, temperature=TEMPERATURE)
            (other,) = MODEL.score(whole, [plain := fstep.pack_thd(part)], temperature=TEMPERATURE)
            found |= fstep.unpack_thd(replace(row, targets={"old": score.logprobs})).targets
            found |= fstep.unpack_thd(replace(plain, targets={"generator": other.logprobs})).targets
            batch.append(fstep.cp_shard(fstep.pack_thd(replace(part, targets=found), multiple_of=multiple), axis=mesh.cp))

        def loss_fn(params: Any, x: Tensor, mb: Packed) -> Any:
            t, logp = mb.targets, MODEL.logprobs(params, x, mb, mesh=mesh, temperature=TEMPERATURE)
            low, high = fstep.ratio_extremes(logp - t["old"], mb.weights)
            assert low == 1 and high == 1
            loss, metrics = fstep.clipped_loss(logp - t["old"], t["advantages"].to(dtype), mb.weights, low=1e-9, high=1e-9)
            return loss, {**metrics, "kl_generator": fstep.kl_loss(t["generator"], t["old"], mb.weights)}

        loss, grads = fstep.pp_forward_backward(MODEL.stage(mesh), loss_fn, params, batch, axis=mesh.pp)
        return fstep.finalize_grads(grads, loss, mesh=mesh)[1]

    for metrics in fstep.simulate(step, **sizes):
        assert metrics["ratio"] == 1 and metrics["clip_low"] == metrics["clip_high"] == metrics["kl_old"] == 0
        assert 0 <= metrics["kl_generator"] < 1e-5 and metrics["grad_norm"] > 1e-3
