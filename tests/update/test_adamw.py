"""AdamW beside torch.optim.AdamW in float64, over a grid of its options, and one step by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fstep.state.state import init_state
from fstep.tree import tree_leaves, tree_map, tree_map_with_path, tree_paths
from fstep.update.adamw import AdamW, adamw
from fstep.update.rows import matrices
from tests.update.cases import assert_close, make_grads, make_params


def torch_adamw(params: Any, steps: int, lr: Any, decayed: Any, opt: AdamW) -> tuple[list[Any], list[Any], list[Any]]:
    leaves = [p.clone().requires_grad_() for p in tree_leaves(params)]
    mask = [decayed(path, p) for path, p in zip(tree_paths(params), leaves, strict=True)]
    groups = [
        {"params": [p for p, m in zip(leaves, mask, strict=True) if m], "weight_decay": opt.weight_decay},
        {"params": [p for p, m in zip(leaves, mask, strict=True) if not m], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=opt.betas, eps=opt.eps, foreach=False)
    for i in range(steps):
        for p, g in zip(leaves, tree_leaves(make_grads(params, i)), strict=True):
            p.grad = g
        oracle.step()
    slots = [oracle.state[p] for p in leaves]
    return [p.detach() for p in leaves], [s["exp_avg"] for s in slots], [s["exp_avg_sq"] for s in slots]


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03, dtype=torch.float64)])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999), (0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize(("weight_decay", "decay"), [(0.0, None), (0.3, None), (0.3, matrices)])
def test_equals_torch(
    device: str, betas: Any, eps: float, weight_decay: float, decay: Any, lr: Any, recording: bool
) -> None:
    opt = AdamW(betas=betas, eps=eps, weight_decay=weight_decay, decay=decay)
    params = make_params(device=device)
    state = init_state(params, opt)
    for i in range(4):
        grads = tree_map(lambda g: g.requires_grad_(recording), make_grads(params, i))
        state = opt.update(state, grads, lr=lr)
    p, mu, nu = torch_adamw(params, 4, lr, decay or (lambda path, leaf: True), opt)
    assert_close(state.params, p)
    assert_close(state.opt.mu, mu)
    assert_close(state.opt.nu, nu)
    assert state.opt.count == 4


def test_two_steps_by_hand() -> None:
    # b1 = b2 = 0.5. First step: mu = g/2, nu = g^2/2, both bias corrections are 1/2, and p moves by lr sign(g).
    # g = 4, then g = 0: mu = 1, nu = 4, corrections 3/4, and p moves by lr (4/3) / sqrt(16/3) = lr / sqrt(3).
    opt = AdamW(betas=(0.5, 0.5), eps=1e-30)
    state = init_state({"w": torch.tensor([1.0], dtype=torch.float64)}, opt)
    state = opt.update(state, {"w": torch.tensor([4.0], dtype=torch.float64)}, lr=0.1)
    assert torch.allclose(state.params["w"], torch.tensor([0.9], dtype=torch.float64), rtol=1e-14)
    state = opt.update(state, {"w": torch.tensor([0.0], dtype=torch.float64)}, lr=0.1)
    assert torch.allclose(state.params["w"], torch.tensor([0.9 - 0.1 / 3**0.5], dtype=torch.float64), rtol=1e-14)


def test_decay_alone_shrinks_the_chosen_leaves() -> None:
    # With zero gradients only the decay moves anything: by 1 - 0.1 * 0.5.
    opt = AdamW(weight_decay=0.5, decay=matrices)
    params = make_params()
    new = opt.update(init_state(params, opt), tree_map(torch.zeros_like, params), lr=0.1)
    expected = tree_map_with_path(lambda path, p: p if path.endswith("norm") else p * 0.95, params)
    assert_close(new.params, expected, 1e-15)


def test_bias_correction_keeps_float32_digits() -> None:
    # 1 - 0.999 in float32 is off by 5e-5; the first step must still be lr to float32 accuracy, on both paths.
    opt = AdamW(betas=(0.999, 0.9999), eps=1e-30)
    for recording in (False, True):
        grads = {"w": torch.tensor([3.0]).requires_grad_(recording)}
        new = opt.update(init_state({"w": torch.zeros(1)}, opt), grads, lr=1.0)
        assert abs(float(new.params["w"].detach()) + 1) < 1e-6


def test_derivative_at_zero_gradient_is_finite() -> None:
    # There the step is g (1 - b1) / (1 - b1) / eps: slope -lr / eps, although sqrt has none.
    opt = AdamW(eps=0.5)
    g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    new = opt.update(init_state({"w": torch.ones(2, dtype=torch.float64)}, opt), {"w": g}, lr=0.1)
    (slope,) = torch.autograd.grad(new.params["w"].sum(), [g])
    assert torch.allclose(slope, torch.full_like(slope, -0.2), rtol=1e-14)


def test_empty_leaf() -> None:
    params = {"none": torch.ones(0, 3), "w": torch.ones(2)}
    new = adamw.update(init_state(params, adamw), tree_map(torch.ones_like, params), lr=0.1)
    assert new.params["none"].shape == (0, 3)
    assert int(new.skipped) == 0


def test_fused_kernel_does_what_is_relied_on(device: str) -> None:
    # Private: one step tensor for all leaves, never written; nothing at all written if found_inf is 1.
    def call(found: float) -> list[torch.Tensor]:
        made = [[torch.full((n,), value, device=device) for n in (3, 40)] for value in (1.0, 0.5, 0.25, 0.125)]
        step = torch.tensor(2.0, device=device)
        torch._fused_adamw_(
            *made[:4],
            [],
            [step, step],
            lr=0.1,
            beta1=0.5,
            beta2=0.5,
            weight_decay=0.0,
            eps=1e-30,
            amsgrad=False,
            maximize=False,
            found_inf=torch.tensor(found, device=device),
        )
        assert step == 2
        return [x for column in made for x in column]

    p, _, g, _, mu, _, nu, _ = (x[0].item() for x in call(1.0))
    assert (p, g, mu, nu) == (1.0, 0.5, 0.25, 0.125)
    p, q, g, _, mu, _, nu, _ = (x[0].item() for x in call(0.0))
    assert (g, mu, nu) == (0.5, 0.375, 0.1875)
    assert p == q == pytest.approx(1 - 0.1 * (0.375 / 0.75) / (0.1875 / 0.75) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"betas": (1.0, 0.9)}, "betas is"),
        ({"betas": (0.9, -0.1)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_bad_hyperparameters(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^AdamW: {message}"):
        AdamW(**kwargs)
