"""Scores on any mesh are those of one process, and those that the loss is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fstep
from fstep import Mesh
from fstep_models.dense import Config, Dense

CONFIG = Config(
    family="qwen3", vocab=29, dim=16, ffn=24, layers=4, heads=4, kv_heads=2, head_dim=4,
    rope=fstep.Rope(theta=10000.0, dim=4), windows=(0, 3, 0, 0), tied=True, qk_norm=True, init_std=0.3,
)  # fmt: skip
MODEL = Dense(CONFIG)
PARAMS = MODEL.init(fstep.Key.seed(0), dtype=torch.float64)
DOCS = fstep.make_docs([fstep.Key.seed(i).permutation(29)[:n] for i, n in enumerate((9, 1, 12, 5))])
OPTIONS: dict[str, Any] = {"temperature": 0.8, "entropy": True, "top": 3}


def rows(multiple_of: int) -> list[fstep.Packed]:
    return [fstep.pack_thd(mb, multiple_of=multiple_of) for mb in fstep.split_microbatches(DOCS, num=2)]


def by_document(scores: tuple[Any, ...], packed: list[fstep.Packed]) -> dict[int, Any]:
    found = {}
    for score, row in zip(scores, packed, strict=True):
        parts = [fstep.split_documents(x, row) for x in fstep.tree_leaves(score)]
        found |= {int(i): [part[n] for part in parts] for n, i in enumerate(row.index)}
    return found


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2, "cp": 2, "tp": 2}, {"pp": 4}], ids=str)
def test_a_mesh_gives_the_scores_of_one_process(sizes: dict[str, int]) -> None:
    want = by_document(MODEL.score(PARAMS, rows(1), **OPTIONS), rows(1))

    def run(mesh: Mesh) -> Any:
        params, whole = MODEL.part(PARAMS, mesh=mesh), rows(2 * mesh.cp.size)
        mine = [fstep.cp_shard(row, axis=mesh.cp) for row in whole]
        return by_document(MODEL.score(params, mine, mesh=mesh, **OPTIONS), whole)

    for got in fstep.simulate(run, **sizes):
        assert got.keys() == want.keys() == {0, 1, 2, 3}
        for i, leaves in want.items():
            for a, b in zip(got[i], leaves, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_scores_are_what_the_loss_is_made_of() -> None:
    for row in rows(1):
        (score,) = MODEL.score(PARAMS, [row])
        x = MODEL.stage()(PARAMS, None, row)
        assert torch.equal(score.logprobs, MODEL.logprobs(PARAMS, x, row))
        assert score.entropy is None and score.top_ids is None and not score.logprobs.requires_grad
        (more,) = MODEL.score(PARAMS, [row], **OPTIONS)
        logp = (MODEL.logits(PARAMS, x) / 0.8).log_softmax(-1)
        labelled = row.labels >= 0
        want = logp.gather(1, row.labels.clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(more.logprobs, torch.where(labelled, want, 0), rtol=1e-12, atol=1e-12)
        entropy = torch.where(labelled, -(logp.exp() * logp).sum(-1), 0)
        torch.testing.assert_close(more.entropy, entropy, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(more.top_logprobs, logp.topk(3).values, rtol=1e-12, atol=0)
        assert torch.equal(more.top_ids, logp.topk(3).indices)
