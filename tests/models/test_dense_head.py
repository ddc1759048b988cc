"""Dense.logprob_sum beside the sum of Dense.logprobs: losses and every gradient leaf, on one rank and on meshes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Key, Mesh, Packed, Ratio
from fstep_models.dense import Config, Dense
from tests.models.test_dense import CONFIGS, pack
from tests.models.test_dense_mesh import assemble, params_of

Score = Callable[[Dense, Any, Any, Packed, Mesh], Tensor]


def by_sum(model: Dense, p: Any, x: Any, mb: Packed, mesh: Mesh, **options: Any) -> Tensor:
    return model.logprob_sum(p, x, mb, mesh=mesh, **options)


def by_tokens(model: Dense, p: Any, x: Any, mb: Packed, mesh: Mesh, weights: Any = None, **options: Any) -> Tensor:
    logp = model.logprobs(p, x, mb, mesh=mesh, **options)
    return (logp * (mb.weights if weights is None else weights)).sum()


def step(model: Dense, params: Any, batch: list[Packed], score: Score, mesh: Mesh = Mesh(), **options: Any) -> Any:  # noqa: B008
    def loss_fn(p: Any, x: Any, mb: Packed) -> Ratio:
        return Ratio(-score(model, p, x, mb, mesh), mb.weights.sum())

    return fstep.pp_forward_backward(model.stage(mesh), loss_fn, params, batch, axis=mesh.pp, **options)


def replace_layers(family: str, layers: int) -> dict[str, Any]:
    kept = {k: v for k, v in CONFIGS[family].to_dict().items() if k != "layer_types"}
    return kept | {"num_hidden_layers": layers}


@pytest.mark.parametrize("family", ["qwen3", "llama-biases-tied"])
def test_equals_the_sum_of_logprobs(family: str) -> None:
    model, packed = Dense(Config.from_hf(CONFIGS[family])), pack()
    params = params_of(model)
    got, want = (step(model, params, [packed], score) for score in (by_sum, by_tokens))
    fstep.testing.assert_trees_close(got, want, rtol=1e-11, atol=1e-14)
    assert all(g.abs().max() > 0 for g in fstep.tree_leaves(got[1]))


@pytest.mark.parametrize("options", [dict(temperature=0.5), dict(weights=True)], ids=str)
def test_options(options: dict) -> None:
    model, packed = Dense(Config.from_hf(CONFIGS["qwen3"])), pack()
    params = params_of(model)
    if "weights" in options:
        options = dict(weights=packed.weights * torch.cos(packed.tokens.double()))
    x = model.stage()(params, None, packed)
    got, want = (
        fstep.value_and_grad(lambda p, x, f=f: f(model, p, x, packed, Mesh(), **options), (0, 1))(params, x)
        for f in (by_sum, by_tokens)
    )
    fstep.testing.assert_trees_close(got, want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("sizes", "schedule"),
    [
        (dict(tp=2), "1f1b"),
        (dict(pp=2), "gpipe"),
        (dict(pp=2), "zbv"),
        (dict(cp=2, tp=2), "1f1b"),
        (dict(pp=2, tp=2), "1f1b"),
    ],
    ids=str,
)
def test_on_a_mesh(sizes: dict, schedule: str) -> None:
    """Split backward passes and pipelines among them: a gradient that is handed out once must not be asked for twice."""
    model = Dense(Config.from_hf(replace_layers("qwen3", 4)))
    whole, batch = params_of(model), [pack(4), pack(4)]
    _, grads = step(model, whole, batch, by_tokens)
    want = dict(zip(fstep.tree_paths(grads), fstep.tree_leaves(grads), strict=True))

    def f(mesh: Mesh) -> Any:
        mine = [fstep.cp_shard(mb, axis=mesh.cp) for mb in batch]
        params = model.part(whole, mesh=mesh, schedule=schedule)
        found, grads = step(model, params, mine, by_sum, mesh, schedule=schedule)
        return found.num, None, list(zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True))

    ranks = fstep.simulate(f, **sizes)
    got = assemble(ranks, sizes.get("tp", 1))
    assert set(got) == set(want)
    for path, g in want.items():
        torch.testing.assert_close(got[path], g, rtol=1e-10, atol=1e-13, msg=path)


def test_a_float32_head_gets_a_gradient_that_is_not_rounded() -> None:
    """Computed in bfloat16, its gradient arrives in float32 and is no bfloat16 number; a tied one's likewise."""
    for family in ("llama", "llama-biases-tied"):
        model = replace(Dense(Config.from_hf(CONFIGS[family])), dtype=torch.bfloat16)
        params, packed = model.init(Key.seed(0)), fstep.cast(pack(), torch.float32)
        for score in (by_sum, by_tokens):
            _, grads = step(model, params, [packed], score)
            g = grads["embed" if model.config.tied else "head"]
            assert g.dtype == torch.float32 and (g != g.bfloat16()).float().mean() > 0.5
        assert model.logits(params, model.stage()(params, None, packed)[:2]).dtype == torch.float32


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("computed", [None, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_of_the_params(computed: torch.dtype | None, own: torch.dtype) -> None:
    model = replace(Dense(Config.from_hf(CONFIGS["llama"])), dtype=computed)
    params = fstep.cast(model.init(Key.seed(0)), own)
    packed = fstep.cast(pack(), torch.float32)
    for score in (by_sum, by_tokens):
        loss, grads = step(model, params, [packed], score)
        assert loss.num.isfinite() and {g.dtype for g in fstep.tree_leaves(grads)} == {own}


def test_a_row_of_another_mesh_is_named() -> None:
    model, packed = Dense(Config.from_hf(CONFIGS["llama"])), pack(4)
    with pytest.raises(TypeError, match=r"Dense.logprob_sum: the microbatch is a Tensor; pass it through pack_thd first"):
        model.logprob_sum({}, packed.tokens, packed.tokens)  # type: ignore[arg-type]
