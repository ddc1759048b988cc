"""The likeliest tokens, beside log_softmax and topk of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Mesh, Shard
from fstep.ops import head

KEY = fstep.Key.seed(7)


def draw(tokens: int, vocab: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    hidden, weight = (KEY.fold_in(i).normal((n, dim), dtype=torch.float64) for i, n in enumerate((tokens, vocab)))
    return hidden, weight


def expected(hidden: Tensor, weight: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1).sort(-1, descending=True)
    return logp.values[:, :k], logp.indices[:, :k]


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 0.7), (11, 2.0)])
def test_equals_log_softmax(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_chunk", lambda vocab, itemsize: 4)  # 9 tokens are three chunks
    hidden, weight = draw(9, 11)
    values, ids = fstep.token_top_logprobs(hidden.requires_grad_(), weight, k, temperature=temperature)
    want, where = expected(hidden, weight, k, temperature)
    torch.testing.assert_close(values, want.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(ids, where) and not values.requires_grad


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_a_head_cut_by_vocabulary(size: int, k: int) -> None:
    """10 ids over 3 and 4 ranks are uneven, and 4 of them more than a rank's own."""
    hidden, weight = draw(7, 10)
    want, where = expected(hidden, weight, k, 0.9)

    def f(mesh: Mesh) -> Any:
        part = weight if size == 1 else Shard.cut(weight, axis=mesh.tp, dim=0)
        mine = fstep.tp_scatter(hidden / size, axis=mesh.tp)
        return fstep.tp_token_top_logprobs(mine, part, k, axis=mesh.tp, tokens=7, temperature=0.9)

    for values, ids in fstep.simulate(f, tp=size):
        torch.testing.assert_close(values, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(ids, where)


def test_bad_input() -> None:
    hidden, weight = draw(3, 4)
    for k in (0, 5, 1.0):
        with pytest.raises(ValueError, match=rf"token_top_logprobs: k is {k}; pass a number from 1 to 4"):
            fstep.token_top_logprobs(hidden, weight, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token_top_logprobs: hidden has shape \(1, 3, 5\); pass \[tokens, dim\]"):
        fstep.token_top_logprobs(hidden[None], weight, 1)
