"""Muon beside torch.optim.Muon for the matrices and torch.optim.AdamW for the rest, leaf by leaf."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fstep.state.state import init_state
from fstep.tree import tree_map, tree_paths
from fstep.update.adamw import AdamW
from fstep.update.muon import Muon, hidden_matrices, muon
from fstep.update.rows import matrices
from tests.update.cases import assert_close, make_grads, make_params, randn, run


def layers_of(params: Any) -> Any:
    """A tree with tall, wide, square and single-row matrices inside layers."""
    shapes = {"q": (6, 4), "o": (3, 7), "s": (5, 5), "row": (1, 8)}
    return {
        **params,
        "layers": {0: {**params["layers"][0], **{n: randn(i, *s) for i, (n, s) in enumerate(shapes.items())}}},
    }


@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03, dtype=torch.float64)])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.2, "momentum": 0.8, "ns_steps": 3},
        {"ns_coefficients": (3.0, -3.2, 1.2), "eps": 1e-3, "momentum": 0.0},
    ],
)
def test_equals_torch(device: str, lr: Any, adjust_lr: Any, nesterov: bool, options: Any) -> None:
    rest = AdamW(betas=(0.8, 0.9), weight_decay=0.1)
    opt = Muon(adjust_lr=adjust_lr, nesterov=nesterov, rest=rest, rest_lr=0.25, **options)
    params = tree_map(lambda p: p.to(device), layers_of(make_params()))
    state = init_state(params, opt)
    hidden = {name: params["layers"][0][name].clone().requires_grad_() for name in ("q", "o", "s", "row")}
    others = {"embed": params["embed"], **{n: params["layers"][0][n] for n in ("experts", "norm")}}
    others = {name: p.clone().requires_grad_() for name, p in others.items()}
    oracle = torch.optim.Muon(
        hidden.values(), lr=lr, adjust_lr_fn=adjust_lr, nesterov=nesterov, **{"weight_decay": 0.0, **options}
    )
    oracle_rest = torch.optim.AdamW(others.values(), lr=lr * 0.25, betas=(0.8, 0.9), weight_decay=0.1, foreach=False)
    for i in range(3):
        grads = make_grads(params, i)
        state = opt.update(state, grads, lr=lr)
        for name, p in {**hidden, **others}.items():
            p.grad = grads[name].clone() if name == "embed" else grads["layers"][0][name].clone()
        oracle.step()
        oracle_rest.step()
    new = {**state.params["layers"][0], "embed": state.params["embed"]}
    memory = state.opt.momentum["layers"][0]
    for name, p in {**hidden, **others}.items():
        assert_close(new[name], p.detach())
    for name, p in hidden.items():
        assert_close(memory[name], oracle.state[p]["momentum_buffer"])
    assert state.opt.rest.count == 3


def test_which_leaf_goes_where() -> None:
    state = muon.init(layers_of(make_params()))
    assert tree_paths(state.momentum) == [f"layers.0.{name}" for name in ("o", "q", "row", "s")]
    assert tree_paths(state.rest.mu) == ["embed", "layers.0.experts", "layers.0.norm"] == tree_paths(state.rest.nu)
    assert not hidden_matrices("layers_norm", torch.ones(2, 2))
    assert not hidden_matrices("layers.0.experts", torch.ones(2, 2, 2))


def test_a_stack_is_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64: a batched product may round otherwise than a single one, and bfloat16 makes much of the difference.
    monkeypatch.setattr("fstep.update.muon.NEWTON_SCHULZ_DTYPE", torch.float64)
    opt = Muon(matrices=matrices, adjust_lr="match_rms_adamw", weight_decay=0.1)
    w, g = randn(0, 3, 6, 4), randn(1, 3, 6, 4)
    g[1] *= 1000.0  # each matrix is normalised by its own norm
    stacked = opt.update(init_state({"w": w}, opt), {"w": g}, lr=0.1)
    alone = [opt.update(init_state({"w": w[i]}, opt), {"w": g[i]}, lr=0.1).params["w"] for i in range(3)]
    assert_close(stacked.params["w"], torch.stack(alone))


def test_the_step_is_nearly_orthogonal(device: str) -> None:
    # From p = 0, undoing the scale, the matrix becomes minus the step: singular values near 1, same singular vectors.
    opt = Muon(matrices=matrices)
    g = randn(0, 24, 16, device=device)
    new = opt.update(init_state({"w": torch.zeros_like(g)}, opt), {"w": g}, lr=(16 / 24) ** 0.5).params["w"]
    values = torch.linalg.svdvals(new)
    assert values.max() < 1.35
    assert values.min() > 0.5
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert -(new * (u @ vh)).sum() / (new.norm() * (u @ vh).norm()) > 0.95


def test_zero_gradient_is_no_step() -> None:
    params = {"layers": {"w": torch.ones(3, 2)}}
    new = muon.update(init_state(params, muon), tree_map(torch.zeros_like, params), lr=0.1)
    assert torch.equal(new.params["layers"]["w"], torch.ones(3, 2))


@pytest.mark.parametrize("chosen", ["all", "none"])
def test_all_or_nothing_to_orthogonalise(chosen: str) -> None:
    params = {"a": randn(0, 3, 4), "b": randn(1, 2, 2)}
    opt = Muon(matrices=lambda path, leaf: chosen == "all")
    for donate in (False, True):
        new = run(opt, tree_map(torch.clone, params), 2, donate=donate)
        assert int(new.skipped) == 0
        assert new.opt.rest.count == 2
    if chosen == "none":
        assert_close(new.params, run(opt.rest, params, 2).params, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients is"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"rest_lr": -1.0}, "rest_lr is -1.0"),
        ({"adjust_lr": "moonshot"}, "adjust_lr is 'moonshot'"),
    ],
)
def test_bad_hyperparameters(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Muon: {message}"):
        Muon(**kwargs)


def test_a_leaf_that_is_no_matrix_is_refused() -> None:
    opt = Muon(matrices=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"^muon\.init: `matrices` chose 'w', which has 1 dimensions"):
        opt.init({"w": torch.ones(3)})
