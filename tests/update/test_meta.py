"""A derivative through two whole steps: finalize_grads and an optimizer, beside finite differences in float64.

The finite differences run on plain values, that is on the fused kernels; the derivatives go through the formulas. Their
agreement says that both compute the same function, and that nothing in it hides from autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fstep.mesh.axis import Mesh
from fstep.ratio import Ratio
from fstep.state.state import init_state
from fstep.tree import tree_map
from fstep.update.adamw import AdamW
from fstep.update.finalize import finalize_grads
from fstep.update.muon import Muon
from fstep.update.sgd import SGD
from tests.update.cases import randn

X, Y = randn(0, 2, 8, 4), randn(1, 2, 8, 3)
HELD_OUT = randn(2, 8, 4), randn(3, 8, 3)
OPTIMIZERS = {
    "adamw": AdamW(weight_decay=0.1),
    "sgd": SGD(weight_decay=0.1),
    "nesterov": SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
    "muon": Muon(weight_decay=0.1, ns_steps=2),
}


def residual(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x @ params["layers"]["w"] + params["b"]) - y


def grads_by_hand(params: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """The gradient of sum_i weights_i |residual_i|^2, written out: plain arithmetic has derivatives in every mode."""
    r = residual(params, x, y)
    d = 2 * weights[:, None] * r * (1 - (r + y) ** 2)
    return {"b": d.sum(0), "layers": {"w": x.T @ d}}


def held_out_loss(opt: Any, max_norm: float, w: Tensor, lr: Tensor, weights: Tensor) -> Tensor:
    """Train for two steps on weighted examples; return the loss on others."""
    params = {"b": torch.zeros(3, dtype=torch.float64), "layers": {"w": w}}
    state = init_state(params, opt)
    for x, y in zip(X, Y, strict=True):
        grads = grads_by_hand(state.params, x, y, weights)
        loss = (weights * (residual(state.params, x, y) ** 2).sum(1)).sum()
        grads, metrics = finalize_grads(grads, Ratio(loss, weights.sum()), mesh=Mesh(), max_norm=max_norm)
        state = opt.update(state, grads, lr=lr)
    return (residual(state.params, *HELD_OUT) ** 2).sum() + metrics["loss"]


ARGUMENTS = (
    randn(4, 4, 3) * 0.3,
    torch.tensor(0.05, dtype=torch.float64),
    torch.linspace(0.5, 1.5, 8, dtype=torch.float64),
)


def test_the_gradient_by_hand_is_the_gradient() -> None:
    params = {"b": torch.zeros(3, dtype=torch.float64), "layers": {"w": ARGUMENTS[0]}}

    def loss(params: Any) -> Tensor:
        return (ARGUMENTS[2] * (residual(params, X[0], Y[0]) ** 2).sum(1)).sum()

    expected, got = torch.func.grad(loss)(params), grads_by_hand(params, X[0], Y[0], ARGUMENTS[2])
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13), got, expected)


@pytest.mark.parametrize("max_norm", [0.05, 1e3])  # clipped, and not
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["autograd", "func"])
def test_meta_gradient(name: str, max_norm: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Finite differences of a function that rounds to bfloat16 would be noise.
    monkeypatch.setattr("fstep.update.muon.NEWTON_SCHULZ_DTYPE", torch.float64)

    def f(*args: Tensor) -> Tensor:
        return held_out_loss(OPTIMIZERS[name], max_norm, *args)

    if mode == "autograd":
        leaves = [x.clone().requires_grad_() for x in ARGUMENTS]
        derivatives = torch.autograd.grad(f(*leaves), leaves)
    else:
        derivatives = torch.func.grad(f, argnums=(0, 1, 2))(*ARGUMENTS)

    step = 1e-5
    for i, derivative in enumerate(derivatives):
        direction = randn(10 + i, *ARGUMENTS[i].shape)
        up, down = ([x + s * step * direction if j == i else x for j, x in enumerate(ARGUMENTS)] for s in (1, -1))
        slope = (f(*up) - f(*down)) / (2 * step)
        assert derivative.abs().max() > 1e-4
        torch.testing.assert_close((derivative * direction).sum(), slope, rtol=2e-7, atol=1e-9)


# Forward mode makes torch load decompositions of its own through the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vmap_over_learning_rates_and_jvp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fstep.update.muon.NEWTON_SCHULZ_DTYPE", torch.float64)
    w, _, weights = ARGUMENTS

    def f(lr: Tensor) -> Tensor:
        return held_out_loss(OPTIMIZERS[name], 0.5, w, lr, weights)

    lrs = torch.tensor([0.01, 0.1], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(f)(lrs), torch.stack([f(lr) for lr in lrs]), rtol=1e-12, atol=0)
    slopes = torch.func.vmap(torch.func.grad(f))(lrs)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(f)(lr) for lr in lrs]), rtol=1e-10, atol=0)
    _, forward = torch.func.jvp(f, (lrs[0],), (torch.ones_like(lrs[0]),))
    torch.testing.assert_close(forward, slopes[0], rtol=1e-10, atol=0)
