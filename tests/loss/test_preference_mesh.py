"""Sums over documents, and the losses made of them, on rows and meshes of all kinds beside documents one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Docs, Mesh, Packed, Ratio
from fstep_models.dense import Config, Dense

F64 = torch.float64
# Pairs 3 and 8 are whole, of pair 5 the rejected answer is masked, of pair 6 both are.
LENGTHS = [5, 9, 3, 2, 7, 4, 6, 3]
PAIR, CHOSEN = [3, 5, 8, 3, 5, 8, 6, 6], [1, 1, 0, 0, 0, 1, 1, 0]
MASKED = (4, 6, 7)
MODEL = Dense(
    Config(
        family="qwen3", vocab=19, dim=8, ffn=12, layers=2, heads=2, kv_heads=2, head_dim=4, windows=(0, 0), tied=False,
        rope=fstep.Rope(theta=100.0, dim=4), qk_norm=True, max_positions=64,
    )
)  # fmt: skip
PARAMS = MODEL.init(fstep.Key.seed(1), dtype=F64)


def make(pair: list[int] = PAIR) -> Docs:
    """Prompts of one token, then answers; reference log probabilities that are no numbers where nothing counts."""
    g = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, 19, (n,), generator=g) for n in LENGTHS]
    weights = [torch.rand(n, generator=g, dtype=F64) + 0.5 for n in LENGTHS]
    reference = [-3 * torch.rand(n, generator=g, dtype=F64) for n in LENGTHS]
    for i, w in enumerate(weights):
        w[: 2 if i % 2 else 1] = 0
        if i in MASKED:
            w.zero_()
    for w, r in zip(weights, reference, strict=True):
        r[w == 0] = math.nan
    weights[3][1] = 1.5  # an answer of one token
    reference[3][1] = -2.0
    fields = {"pair": pair, "chosen": [bool(c) for c in CHOSEN]}
    return fstep.make_docs(tokens, weights=weights, targets={"reference": reference}, per_document=fields)


def pairs_of(mb: Packed) -> fstep.Pairs:
    return fstep.find_pairs(mb.per_document["pair"], mb.per_document["chosen"])


def logprobs(params: Any, x: Tensor, mb: Packed, mesh: Mesh) -> Tensor:
    return MODEL.logprobs(params, x, mb, mesh=mesh, temperature=0.8)


def dpo(params: Any, x: Tensor, mb: Packed, mesh: Mesh) -> Any:
    logp = logprobs(params, x, mb, mesh)
    ratios = fstep.cp_sequence_sums(logp - mb.targets["reference"], mb, axis=mesh.cp)
    return fstep.as_partial(fstep.dpo_loss(ratios, pairs_of(mb), beta=0.7, label_smoothing=0.1), axis=mesh.cp)


def orpo(params: Any, x: Tensor, mb: Packed, mesh: Mesh) -> Any:
    logp = logprobs(params, x, mb, mesh)
    sums = fstep.cp_sequence_sums(logp, mb, axis=mesh.cp)
    return fstep.as_partial(fstep.orpo_loss(sums, pairs_of(mb), beta=0.7), axis=mesh.cp)


def kto(params: Any, x: Tensor, mb: Packed, mesh: Mesh) -> Any:
    logp = logprobs(params, x, mb, mesh)
    ratios = fstep.cp_sequence_sums(logp - mb.targets["reference"], mb, axis=mesh.cp)
    loss = fstep.kto_loss(ratios, mb.per_document["chosen"], beta=0.7, kl=0.3, undesirable=0.8)
    return fstep.as_partial(loss, axis=mesh.cp)


def reward_at(params: Any, x: Tensor) -> Tensor:
    """Take a row of the head for a reward head."""
    return fstep.rms_norm(x, params["norm"], eps=1e-6) @ params["head"][3]


def reward(params: Any, x: Tensor, mb: Packed, mesh: Mesh) -> Any:
    rewards = fstep.cp_sequence_last(reward_at(params, x), mb, axis=mesh.cp)
    return fstep.as_partial(fstep.bradley_terry_loss(rewards, pairs_of(mb), margin=0.2, center=0.1), axis=mesh.cp)


LOSSES: dict[str, Callable[..., Any]] = {"dpo": dpo, "orpo": orpo, "kto": kto, "reward": reward}


def train(mesh: Mesh, loss: Callable[..., Any], multiple_of: int = 1, **cut: Any) -> Any:
    """One step up to finalized gradients."""
    docs = make()
    multiple = math.lcm(multiple_of, 2 * mesh.cp.size)
    parts = fstep.split_microbatches(docs, multiple_of=multiple, axis=mesh.dp, together=docs.per_document["pair"], **cut)
    batch = [fstep.cp_shard(fstep.pack_thd(part, multiple_of=multiple), axis=mesh.cp) for part in parts]

    def loss_fn(params: Any, x: Tensor, mb: Packed) -> Any:
        return loss(params, x, mb, mesh)

    params = MODEL.part(PARAMS, mesh=mesh)
    found, grads = fstep.pp_forward_backward(MODEL.stage(mesh), loss_fn, params, batch, axis=mesh.pp)
    return fstep.finalize_grads(grads, found, mesh=mesh)


def by_document(loss: str) -> tuple[Tensor, Tensor, Any]:
    """Compute the mean loss of documents run one at a time, in plain formulae, with its gradients."""

    def mean(params: Any) -> tuple[Tensor, Tensor]:
        docs = make()
        sums, counts, last = [], [], []
        for i in range(len(LENGTHS)):
            mb = fstep.pack_thd(fstep.select_documents(docs, [i]))
            x = MODEL.stage()(params, None, mb)
            logp = logprobs(params, x, mb, Mesh())
            less = torch.zeros(()) if loss == "orpo" else mb.targets["reference"]
            sums.append(sum((w * x for w, x in zip(mb.weights, logp - less, strict=True) if w), torch.zeros(())))
            counts.append(float(mb.weights.sum()))
            last.append(reward_at(params, x)[-1])
        total, n = torch.zeros((), dtype=F64), 0
        if loss == "kto":
            for s, k, c in zip(sums, counts, CHOSEN, strict=True):
                if k:
                    total, n = total + (1.0 if c else 0.8) * torch.sigmoid((-0.7 if c else 0.7) * (s - 0.3)), n + 1
            return total / n, total
        for number in sorted(set(PAIR)):
            c, r = sorted((i for i in range(len(PAIR)) if PAIR[i] == number), key=lambda i: -CHOSEN[i])
            if loss == "reward":
                total = total - (1 / (1 + (last[r] - last[c] + 0.2).exp())).log() + 0.1 * (last[c] + last[r]) ** 2
            elif not counts[c] or not counts[r]:
                continue
            elif loss == "orpo":
                odds = [(p := (sums[i] / counts[i]).exp()) / (1 - p) for i in (c, r)]
                total = total - sums[c] / counts[c] + 0.7 * (1 + odds[1] / odds[0]).log()
            else:
                z = 0.7 * (sums[c] - sums[r])
                total = total + 0.9 * (1 + (-z).exp()).log() + 0.1 * (1 + z.exp()).log()
            n += 1
        return total / n, torch.tensor(float(n))

    (value, n), grads = fstep.value_and_grad(mean, has_aux=True)(PARAMS)
    return value, n, grads


WHOLE = {name: by_document(name) for name in LOSSES}


def check(name: str, mesh: Mesh, grads: Any, metrics: Any) -> None:
    value, _, want = WHOLE[name]
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-12)
    assert all(g.norm() > 1e-6 for g in fstep.tree_leaves(want))
    fstep.testing.assert_trees_close(grads, MODEL.part(want, mesh=mesh), rtol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cut", [{"num": 1}, {"num": 3}, {"num": 6}, {"max_tokens": 20, "multiple_of": 4}], ids=str)
def test_any_split_is_the_same(name: str, cut: dict[str, int]) -> None:
    check(name, Mesh(), *train(Mesh(), LOSSES[name], **cut))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "sizes", [{"dp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}, {"cp": 3}, {"dp": 5}, {"pp": 2, "cp": 2}], ids=str
)
def test_any_mesh_is_the_same(name: str, sizes: dict[str, int]) -> None:
    one = train(Mesh(), LOSSES[name], num=1)[1]
    for mesh, (grads, metrics) in fstep.simulate(lambda m: (m, train(m, LOSSES[name], num=2)), **sizes):
        check(name, mesh, grads, metrics)
        fstep.testing.assert_trees_close(metrics, one, rtol=1e-11)


def test_over_tensor_parallel_ranks() -> None:
    for mesh, (grads, metrics) in fstep.simulate(lambda m: (m, train(m, dpo, num=2)), tp=2, cp=2):
        check("dpo", mesh, grads, metrics)


def test_the_baseline_of_kto_is_that_of_the_whole_batch() -> None:
    def baseline(mesh: Mesh) -> Tensor:
        docs, multiple = make(), 2 * mesh.cp.size
        parts = fstep.split_microbatches(docs, num=3, multiple_of=multiple, axis=mesh.dp)
        batch = [fstep.cp_shard(fstep.pack_thd(part, multiple_of=multiple), axis=mesh.cp) for part in parts]

        def kl(params: Any, x: Tensor, mb: Packed) -> Ratio:
            logp = logprobs(params, x, mb, mesh)
            ratios = fstep.cp_sequence_sums(logp - mb.targets["reference"], mb, axis=mesh.cp)
            return fstep.as_partial(fstep.kto_kl(ratios), axis=mesh.cp)

        found = fstep.pp_forward(MODEL.stage(mesh), kl, MODEL.part(PARAMS, mesh=mesh), batch, axis=mesh.pp)
        return fstep.psum(sum(found[1:], found[0]), axis=mesh.over("dp", "cp")).mean()

    want, docs = 0.0, make()
    for i in range(len(LENGTHS)):
        mb = fstep.pack_thd(fstep.select_documents(docs, [i]))
        logp = logprobs(PARAMS, MODEL.stage()(PARAMS, None, mb), mb, Mesh())
        want += sum(float(w * (x - y)) for w, x, y in zip(mb.weights, logp, mb.targets["reference"], strict=True) if w) / 5
    for sizes in ({}, {"dp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}):
        for found in fstep.simulate(baseline, **sizes):
            assert found.item() == pytest.approx(want, rel=1e-12)


# The sums ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_sums_by_hand(multiple_of: int) -> None:
    docs = make()
    mb = fstep.pack_thd(docs, multiple_of=multiple_of)
    values = torch.arange(float(len(mb.tokens)), dtype=F64).masked_fill(mb.weights == 0, math.nan).requires_grad_()
    found = fstep.testing.assert_pure(fstep.cp_sequence_sums, values, mb, axis=Mesh().cp)
    for i, (a, b) in enumerate(zip(mb.cu_seqlens_padded[:-1].tolist(), mb.cu_seqlens_padded[1:].tolist(), strict=True)):
        pairs = [(float(w), t) for t, w in enumerate(mb.weights.tolist()) if a <= t < b and w]
        assert found.num[i].item() == pytest.approx(sum(w * t for w, t in pairs))
        assert found.den[i].item() == pytest.approx(sum(w for w, _ in pairs))
    (g,) = torch.autograd.grad((found.num * torch.arange(8)).sum(), values)
    document = torch.repeat_interleave(torch.arange(8), mb.cu_seqlens_padded.diff())
    assert torch.equal(g, document * mb.weights)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_last_tokens(size: int) -> None:
    docs = fstep.make_docs([[4], [1, 2], [7], [1, 2, 3, 5, 9], [1, 1, 1, 6]])
    packed = fstep.pack_thd(docs, multiple_of=2 * size, length=12 * size * 2)

    def f(mesh: Mesh) -> Any:
        mb = fstep.cp_shard(packed, axis=mesh.cp)
        values = mb.tokens.to(F64).masked_fill(mb.tokens == 0, math.nan).requires_grad_()
        last = fstep.cp_sequence_last(values, mb, axis=mesh.cp)
        (g,) = torch.autograd.grad((last * torch.tensor([1.0, 2, 3, 4, 5])).sum(), values)
        return last.detach(), fstep.cp_unshard(g, mb, axis=mesh.cp, grad="slice")

    at = (packed.cu_seqlens_padded[:-1] + packed.cu_seqlens.diff() - 1).long()
    want = torch.zeros(len(packed.tokens), dtype=F64).index_put((at,), torch.arange(1.0, 6, dtype=F64))
    for last, g in fstep.simulate(f, cp=size):
        assert last.tolist() == [4, 2, 7, 9, 6] and torch.equal(g, want)


def test_a_row_without_documents() -> None:
    docs = make()
    empty = fstep.pack_thd(fstep.select_documents(docs, []), multiple_of=4)

    def f(mesh: Mesh) -> Any:
        mb = fstep.cp_shard(empty, axis=mesh.cp)
        logp = torch.zeros(len(mb.tokens), dtype=F64, requires_grad=True)
        ratios = fstep.cp_sequence_sums(logp, mb, axis=mesh.cp)
        loss, metrics = fstep.as_partial(fstep.dpo_loss(ratios, pairs_of(mb), beta=0.7), axis=mesh.cp)
        assert not torch.autograd.grad(loss.num, logp)[0].any()
        return loss.detach(), {n: r.mean() for n, r in metrics.items()}

    for size in (1, 2):
        for loss, metrics in fstep.simulate(f, cp=size):
            assert loss.num == loss.den == 0 and not any(x for x in metrics.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda v, mb, m: fstep.cp_sequence_sums(v[1:], mb, axis=m.cp),
            r"cp_sequence_sums: values has shape \(38,\) for 39",
        ),
        (
            lambda v, mb, m: fstep.cp_sequence_last(v[:, None], mb, axis=m.cp),
            r"cp_sequence_last: values has shape \(39, 1\)",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.zeros(39), fstep.pack_thd(make()), Mesh())


def test_the_whole_row_is_no_shard() -> None:
    with pytest.raises(
        ValueError, match=r"^cp_sequence_sums: packed is a whole row, and axis 'cp' has 2 ranks; pass what cp_"
    ):
        fstep.simulate(lambda m: fstep.cp_sequence_sums(torch.zeros(39), fstep.pack_thd(make()), axis=m.cp), cp=2)
