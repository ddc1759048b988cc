"""Data parallel: a step on any number of ranks is the step on one."""

import pytest
import torch

import fstep
import fstep.testing
from fstep_models.dense import Config, Dense

CONFIG = Config(
    family="qwen3", vocab=29, dim=16, ffn=24, layers=2, heads=2, kv_heads=1, head_dim=8,
    rope=fstep.Rope(theta=10000.0, dim=8), windows=(0, 3), tied=True, qk_norm=True,
)  # fmt: skip
LENGTHS = {"many": [9, 2, 7, 1, 5, 12, 3, 3], "fewer than ranks": [6, 4], "one": [5], "one token each": [1, 1, 1]}


def documents(lengths: list[int], masked: tuple[int, ...] = ()) -> fstep.Docs:
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 29, (n,), generator=g) for n in lengths]
    weights = [torch.rand(n, generator=g, dtype=torch.float64) * (i not in masked) for i, n in enumerate(lengths)]
    return fstep.make_docs(tokens, weights=weights)


def one_step(mesh: fstep.Mesh, docs: fstep.Docs, optimizer=fstep.sgd, poison: int | None = None):
    model = Dense(CONFIG)
    state = fstep.init_state(model.init(fstep.Key.seed(3), dtype=torch.float64), optimizer)
    mine = fstep.divide_documents(docs, axis=mesh.dp)
    batch = [fstep.pack_thd(mb) for mb in fstep.split_microbatches(mine, max_tokens=14)]

    def loss_fn(params, x, mb):
        logp = model.logprobs(params, x, mb)
        hits = fstep.Ratio((logp > -3).to(torch.float64).sum(), torch.tensor(float(len(logp)), dtype=torch.float64))
        return fstep.sft_loss(logp, mb.weights), {"hits": hits}

    loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, state.params, batch)
    if poison == mesh.rank:
        grads = {**grads, "norm": grads["norm"] * torch.nan}
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=0.05)
    return optimizer.update(state, grads, lr=0.1), grads, metrics


@pytest.mark.parametrize("dp", [2, 3, 4])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("masked", [(), (0,), tuple(range(8))], ids=["all count", "longest masked", "all masked"])
def test_a_step_on_ranks_is_the_step_on_one(dp: int, name: str, masked: tuple[int, ...]) -> None:
    docs = documents(LENGTHS[name], masked)
    state, grads, metrics = one_step(fstep.Mesh(), docs)
    results = fstep.simulate(lambda mesh: one_step(mesh, docs), dp=dp)
    for other_state, other_grads, other_metrics in results:
        # The weight of a padded row counts places; what is padded differs with the split.
        expected = {k: v for k, v in metrics.items() if k != "hits"}
        fstep.testing.assert_trees_close({k: other_metrics[k] for k in expected}, expected, rtol=1e-10, atol=1e-300)
        fstep.testing.assert_trees_close(other_grads, grads, rtol=1e-10, atol=1e-300)
        fstep.testing.assert_trees_close(other_state.params, state.params, rtol=1e-10)
    first = fstep.tree_leaves(results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, fstep.tree_leaves(other), strict=True)), "ranks must not drift"


def test_ranks_hold_different_documents_and_all_of_them() -> None:
    docs = documents(LENGTHS["many"])
    parts = fstep.simulate(lambda mesh: fstep.divide_documents(docs, axis=mesh.dp), dp=3)
    assert sorted(i for part in parts for i in part.index.tolist()) == list(range(8))
    tokens = [len(part.tokens) for part in parts]
    assert max(tokens) - min(tokens) <= 3
    joined = fstep.join_documents(parts)
    assert all(torch.equal(a, b) for a, b in zip(fstep.tree_leaves(joined), fstep.tree_leaves(docs), strict=True))


@pytest.mark.parametrize("optimizer", [fstep.adamw, fstep.sgd, fstep.muon], ids=["adamw", "sgd", "muon"])
def test_nan_on_one_rank_is_skipped_by_all(optimizer) -> None:
    docs = documents(LENGTHS["many"])
    for state, grads, metrics in fstep.simulate(lambda mesh: one_step(mesh, docs, optimizer, poison=1), dp=3):
        assert float(metrics["nonfinite"]) == 1.0 and int(state.skipped) == 1
        assert all(bool(g.isnan().all()) for g in fstep.tree_leaves(grads))
        fresh = Dense(CONFIG).init(fstep.Key.seed(3), dtype=torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(*map(fstep.tree_leaves, (state.params, fresh)), strict=True))


def test_arguments_are_left_alone() -> None:
    def run(mesh: fstep.Mesh) -> None:
        grads = {"w": torch.ones(3, dtype=torch.float64) * (mesh.rank + 1), "frozen": None}
        loss = fstep.Ratio(torch.tensor(2.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
        out, _ = fstep.testing.assert_pure(fstep.finalize_grads, grads, loss, mesh=mesh)
        assert out["w"].tolist() == [3 / 8] * 3 and out["frozen"] is None

    fstep.simulate(run, dp=2)
