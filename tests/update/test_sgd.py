"""SGD beside torch.optim.SGD in float64, over a grid of its options, and a few steps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fstep.state.state import init_state
from fstep.tree import tree_leaves, tree_map, tree_paths
from fstep.update.rows import matrices
from fstep.update.sgd import SGD, sgd
from tests.update.cases import assert_close, make_grads, make_params


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03, dtype=torch.float64)])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("weight_decay", "decay"), [(0.0, None), (0.3, None), (0.3, matrices)])
def test_equals_torch(
    device: str, momentum: float, nesterov: bool, weight_decay: float, decay: Any, lr: Any, recording: bool
) -> None:
    opt = SGD(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, decay=decay)
    params = make_params(device=device)
    state = init_state(params, opt)
    leaves = [p.clone().requires_grad_() for p in tree_leaves(params)]
    decayed = [decay is None or decay(path, p) for path, p in zip(tree_paths(params), leaves, strict=True)]
    groups = [{"params": [p], "weight_decay": weight_decay if d else 0.0} for p, d in zip(leaves, decayed, strict=True)]
    oracle = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, foreach=False)
    for i in range(4):
        grads = make_grads(params, i)
        state = opt.update(state, tree_map(lambda g: g.requires_grad_(recording), grads), lr=lr)
        for p, g in zip(leaves, tree_leaves(grads), strict=True):
            p.grad = g.detach()
        oracle.step()
    assert_close(state.params, [p.detach() for p in leaves])
    if momentum:
        assert_close(state.opt.momentum, [oracle.state[p]["momentum_buffer"] for p in leaves])


def test_by_hand() -> None:
    # momentum 0.5, gradients 1, 1: buffers 1, 1.5. Steps 0.1, 0.15; with nesterov 0.1 (1 + 0.5), 0.1 (1 + 0.75).
    for nesterov, expected in ((False, 1 - 0.25), (True, 1 - 0.325)):
        opt = SGD(momentum=0.5, nesterov=nesterov)
        state = init_state({"w": torch.ones(3, dtype=torch.float64)}, opt)
        for _ in range(2):
            state = opt.update(state, {"w": torch.ones(3, dtype=torch.float64)}, lr=0.1)
        assert torch.allclose(state.params["w"], torch.full((3,), expected, dtype=torch.float64), rtol=1e-14)


def test_without_momentum_nothing_is_kept() -> None:
    state = sgd.init(make_params())
    assert sum(x.numel() for x in tree_leaves(state)) == 0


def test_momentum_on_a_state_without_buffers_is_refused() -> None:
    params = make_params()
    with pytest.raises(ValueError, match=r"sgd.update: momentum is 0.9, but opt state has no buffers"):
        SGD(momentum=0.9).update(init_state(params, sgd), make_grads(params, 0), lr=0.1)


def test_fused_kernel_does_what_is_relied_on(device: str) -> None:
    # Private: buffers of zeros are a first step, and nothing at all is written if found_inf is 1.
    for found in (1.0, 0.0):
        p, g, m = ([torch.full((40,), value, device=device)] for value in (1.0, 0.5, 0.0))
        torch._fused_sgd_(
            p,
            g,
            m,
            lr=0.5,
            weight_decay=0.0,
            momentum=0.5,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=torch.tensor(found, device=device),
        )
        assert [x[0][0].item() for x in (p, g, m)] == ([1.0, 0.5, 0.0] if found else [0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"nesterov": True}, "nesterov=True needs momentum > 0"),
    ],
)
def test_bad_hyperparameters(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^SGD: {message}"):
        SGD(**kwargs)
