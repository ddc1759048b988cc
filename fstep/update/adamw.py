"""AdamW: hyperparameters are a frozen value, the memory is a tree, a step is a function.

opt = AdamW(betas=(0.9, 0.95))         a value; `adamw` is one with the defaults
opt.init(params)              ->       AdamWState(count, mu, nu)
opt.update(state, grads, lr)  ->       the next TrainState
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from fstep.grad.autodiff import Predicate
from fstep.grad.messages import device_of
from fstep.state.state import TrainState
from fstep.tree import pytree, tree_map, tree_replace_leaves
from fstep.update.finite import to_skip
from fstep.update.memory import refuse_donation
from fstep.update.rows import (
    Decay,
    Row,
    check_update,
    decays,
    line_up,
    next_state,
    require,
    rows_recording,
    select,
    trained,
    update_rows,
)


@pytree
class AdamWState:
    """What AdamW remembers: applied updates so far, and for each trained leaf its two moments (``None`` if frozen).

    ``count`` is a 0-d float32 tensor, as the fused kernels want it; it is exact up to 2**24 updates, long after every
    bias correction has become 1. Steps that were skipped are not in it.

    >>> import torch, fstep
    >>> fstep.adamw.init({"w": torch.ones(2), "b": torch.ones(1)}, trainable=lambda path: path == "w")
    AdamWState(count=tensor(0.), mu={'w': tensor([0., 0.]), 'b': None}, nu={'w': tensor([0., 0.]), 'b': None})
    """

    count: Tensor
    mu: Any
    nu: Any


@dataclass(frozen=True)
class AdamW:
    r"""Adam with decoupled weight decay (Loshchilov and Hutter, 2019), equal to `torch.optim.AdamW`.

    With gradient :math:`g` and :math:`t` the number of this update among the applied ones, from 1::

        mu = b1 mu + (1 - b1) g                  p = p - lr weight_decay p         (leaves that ``decay`` chooses)
        nu = b2 nu + (1 - b2) g^2                p = p - lr (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)

    ``decay(path, leaf)`` says which leaves are decayed (``None``: all; `matrices` is the usual choice). Raises
    `ValueError` for betas outside [0, 1), ``eps`` that is not positive (an element of zero gradient would be 0/0) and
    negative ``weight_decay``.

    >>> import torch, fstep
    >>> state = fstep.init_state({"w": torch.tensor([1.0, 1.0])}, fstep.adamw)
    >>> state = fstep.adamw.update(state, {"w": torch.tensor([3.0, -0.2])}, lr=0.1)
    >>> state.params["w"]
    tensor([0.9000, 1.1000])
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Decay | None = None

    def __post_init__(self) -> None:
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"AdamW: betas is {self.betas}; pass two numbers in [0, 1), e.g. (0.9, 0.95)",
        )
        require(self.eps > 0, f"AdamW: eps is {self.eps}; pass a number > 0, e.g. 1e-8")
        require(self.weight_decay >= 0, f"AdamW: weight_decay is {self.weight_decay}; pass a number >= 0")

    def init(self, params: Any, *, trainable: Predicate | None = None) -> AdamWState:
        """Return zero moments for the leaves whose path ``trainable`` chooses (all by default), in the params' dtype.

        Raises `TypeError` for a chosen leaf that is not floating-point, `ValueError` for params without leaves.

        >>> import torch, fstep
        >>> int(fstep.adamw.init({"w": torch.ones(2)}).count)
        0
        """
        chosen = select("adamw.init", params, trainable)
        return adamw_zeros(chosen, device_of(params))

    def update(
        self, state: TrainState, grads: Any, *, lr: float | Tensor, skip: Tensor | None = None, donate: bool = False
    ) -> TrainState:
        """Take one step; ``grads`` has the params' structure, ``None`` at frozen leaves; ``lr`` a float or 0-d tensor.

        If ``skip`` is true, params, moments and count keep their bits and ``skipped`` goes up by one; the decision is made
        on the device and nobody waits for it. ``step`` always goes up by one. ``skip`` is a 0-d tensor: pass
        ``metrics["nonfinite"]`` of `finalize_grads`, which has looked at every gradient already. By default this function
        looks again, and skips if any element is not finite, which takes a seventh longer.
        ``donate=True`` reuses the memory of ``state`` (and of the params it was made from), which is dead afterwards.
        An outer derivative (`torch.func.grad`, or `torch.autograd.grad` if something here requires grad) and `vmap` go
        through, and take a slower path. Raises `ValueError` naming the first leaf whose gradient is missing, unexpected
        or of another shape.

        On a mesh ``skip`` has to be *replicated* over all ranks, as the metrics are.

        >>> import torch, fstep
        >>> state = fstep.init_state({"w": torch.ones(2)}, fstep.adamw)
        >>> bad = fstep.adamw.update(state, {"w": torch.tensor([float("nan"), 1.0])}, lr=0.1, donate=True)
        >>> bad.params["w"], int(bad.step), int(bad.skipped), int(bad.opt.count)
        (tensor([1., 1.]), 1, 1, 0)
        >>> grads, metrics = {"w": torch.ones(2)}, {"grad_norm": torch.tensor(70.0)}
        >>> int(fstep.adamw.update(bad, grads, lr=0.1, skip=~(metrics["grad_norm"] < 50)).skipped)  # NaN is not < 50 either
        2
        """
        check_update("adamw", state, lr, AdamWState)
        rows = line_up("adamw.update", state, grads, state.opt.mu, state.opt.nu)
        live = trained(rows)
        recording = rows_recording(live, state.opt.count, lr)
        if donate:
            refuse_donation("adamw.update", live, grads, recording)
        bad = to_skip("adamw.update", skip, [row.grad for row in live], recording)
        params, opt = adamw_rows(self, live, grads, state.opt, bad, lr=lr, donate=donate, recording=recording)
        return next_state(state, rows, params, opt, bad, donate)


def adamw_zeros(chosen: Any, device: torch.device) -> AdamWState:
    """Return the state before the first update; its count is on ``device``."""
    return AdamWState(
        torch.zeros((), dtype=torch.float32, device=device),
        tree_map(torch.zeros_like, chosen),
        tree_map(torch.zeros_like, chosen),
    )


def adamw_rows(
    opt: AdamW,
    rows: Sequence[Row],
    grads: Any,
    memory: AdamWState,
    bad: Tensor,
    *,
    lr: float | Tensor,
    donate: bool,
    recording: bool,
) -> tuple[list[Tensor], AdamWState]:
    """Apply AdamW to rows of ``grads`` whose slots are ``(mu, nu)``; return their new params, and the state of them all."""
    t = memory.count + 1
    b1, b2 = opt.betas

    def kernel(columns: list[list[Tensor]], grads: list[Tensor], weight_decay: float, found_inf: Tensor) -> None:
        step = t.to(found_inf.device, torch.float32)
        _fused_adamw(columns, grads, step, found_inf, lr, opt.betas, opt.eps, weight_decay)

    def formula(p: Tensor, g: Tensor, slots: tuple[Tensor, ...], weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
        mu = torch.lerp(slots[0], g, 1 - b1)
        nu = b2 * slots[1] + (1 - b2) * g * g
        # The square root has no derivative at 0, and where nu is 0 nothing depends on it.
        some = nu != 0
        root = torch.where(some, torch.where(some, nu, 1.0).sqrt(), 0.0)
        denominator = root / _unbias(b2, t, p).sqrt() + opt.eps
        return p * (1 - lr * weight_decay) - lr / _unbias(b1, t, p) * mu / denominator, mu, nu

    new = update_rows(
        rows,
        bad,
        formula,
        kernel,
        weight_decays=decays(grads, rows, opt.weight_decay, opt.decay),
        donate=donate,
        recording=recording,
    )
    mu, nu = memory.mu, memory.nu
    if not donate:  # else they are the same tensors
        mu = tree_replace_leaves(mu, [mu for _, mu, _ in new])
        nu = tree_replace_leaves(nu, [nu for _, _, nu in new])
    return [p for p, _, _ in new], AdamWState(torch.where(bad, memory.count, t), mu, nu)


def _unbias(beta: float, t: Tensor, like: Tensor) -> Tensor:
    """Compute 1 - beta^t; for beta near 1 the plain form would lose most of float32's digits."""
    return -torch.expm1(t.to(like.device, like.dtype) * (log(beta) if beta else -inf))


def _fused_adamw(
    columns: list[list[Tensor]],
    grads: list[Tensor],
    step: Tensor,
    found_inf: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Run torch's kernel in place on params, mu and nu; it reads ``step`` and does nothing if ``found_inf`` is 1."""
    params, mu, nu = columns
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = lr.to(found_inf.device, torch.float32)  # read as float32 on the device
    torch._fused_adamw_(
        params,
        grads,
        mu,
        nu,
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


adamw = AdamW()
