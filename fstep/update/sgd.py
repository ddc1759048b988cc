"""Stochastic gradient descent, with momentum if asked for.

SGD()                               p - lr g                        remembers nothing
SGD(momentum=0.9)                   p - lr (g + 0.9 g' + ...)       remembers one tensor a leaf
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fstep.grad.autodiff import Predicate, choose_trainable
from fstep.state.state import TrainState
from fstep.tree import pytree, static, tree_leaves, tree_map, tree_replace_leaves
from fstep.update.finite import to_skip
from fstep.update.memory import refuse_donation
from fstep.update.rows import (
    Decay,
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
class SGDState:
    """What SGD remembers: a momentum buffer for each trained leaf, ``None`` for a frozen one.

    Without momentum there are no buffers, to be saved or cut, and ``trained`` says of each leaf whether it is.

    >>> import torch, fstep
    >>> fstep.sgd.init({"w": torch.ones(3), "b": torch.ones(1)}, trainable=lambda path: path == "w")
    SGDState(momentum=None, trained=(False, True))
    """

    momentum: Any
    trained: tuple[bool, ...] = static(default=())


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum and (coupled) weight decay, equal to `torch.optim.SGD` with ``dampening=0``.

    With gradient ``g``::

        g = g + weight_decay p       (leaves that ``decay`` chooses)
        m = momentum m + g
        p = p - lr m                 or, with nesterov,  p - lr (g + momentum m)

    There is no dampening: torch applies it from the second step on only, so its result depends on which step is the
    first, and a state would have to remember that. Raises `ValueError` for momentum outside [0, 1), a negative
    weight_decay, and nesterov without momentum.

    >>> import torch, fstep
    >>> state = fstep.init_state({"w": torch.tensor([1.0, 1.0])}, fstep.sgd)
    >>> fstep.sgd.update(state, {"w": torch.tensor([3.0, -0.2])}, lr=0.1).params["w"]
    tensor([0.7000, 1.0200])
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: Decay | None = None

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, f"SGD: momentum is {self.momentum}; pass a number in [0, 1)")
        require(self.weight_decay >= 0, f"SGD: weight_decay is {self.weight_decay}; pass a number >= 0")
        require(not self.nesterov or self.momentum > 0, "SGD: nesterov=True needs momentum > 0, e.g. momentum=0.9")

    def init(self, params: Any, *, trainable: Predicate | None = None) -> SGDState:
        """Return zero buffers for the leaves whose path ``trainable`` chooses (all by default).

        Raises `TypeError` for a chosen leaf that is not floating-point, `ValueError` for params without leaves.

        >>> import torch, fstep
        >>> fstep.SGD(momentum=0.9).init({"w": torch.ones(3)})
        SGDState(momentum={'w': tensor([0., 0., 0.])}, trained=())
        """
        chosen = select("sgd.init", params, trainable)
        if self.momentum:
            return SGDState(tree_map(torch.zeros_like, chosen))
        return SGDState(None, tuple(choose_trainable(params, trainable, none_is_fine=True)))

    def update(
        self, state: TrainState, grads: Any, *, lr: float | Tensor, skip: Tensor | None = None, donate: bool = False
    ) -> TrainState:
        """Take one step; arguments, skipping, donation and errors are those of `AdamW.update`.

        >>> import torch, fstep
        >>> opt = fstep.SGD(momentum=0.5)
        >>> state = fstep.init_state({"w": torch.tensor([1.0])}, opt)
        >>> for _ in range(2):
        ...     state = opt.update(state, {"w": torch.tensor([1.0])}, lr=0.1, donate=True)
        >>> state.params["w"]  # 1 - 0.1 - 0.15
        tensor([0.7500])
        """
        check_update("sgd", state, lr, SGDState)
        memory = state.opt.momentum
        if memory is None:
            if self.momentum:
                raise ValueError(
                    f"sgd.update: momentum is {self.momentum}, but opt state has no buffers; call init of the same optimizer"
                )
            leaves = zip(tree_leaves(state.params), state.opt.trained, strict=True)
            memory = tree_replace_leaves(state.params, [x if mine else None for x, mine in leaves])  # marks, no memory
        rows = line_up("sgd.update", state, grads, memory)
        live = trained(rows)
        if not self.momentum:
            live = [row._replace(slots=()) for row in live]
        recording = rows_recording(live, lr)
        if donate:
            refuse_donation("sgd.update", live, grads, recording)
        bad = to_skip("sgd.update", skip, [row.grad for row in live], recording)

        def kernel(columns: list[list[Tensor]], grads: list[Tensor], weight_decay: float, found_inf: Tensor) -> None:
            buffers = columns[1] if self.momentum else []
            _fused_sgd(columns[0], grads, buffers, found_inf, lr, self.momentum, self.nesterov, weight_decay)

        def formula(p: Tensor, g: Tensor, slots: tuple[Tensor, ...], weight_decay: float) -> tuple[Tensor, ...]:
            g = g + weight_decay * p if weight_decay else g
            if not self.momentum:
                return (p - lr * g,)
            m = self.momentum * slots[0] + g
            return p - lr * (g + self.momentum * m if self.nesterov else m), m

        new = update_rows(
            live,
            bad,
            formula,
            kernel,
            weight_decays=decays(grads, live, self.weight_decay, self.decay),
            donate=donate,
            recording=recording,
        )
        opt = state.opt
        if self.momentum and not donate:
            opt = SGDState(tree_replace_leaves(state.opt.momentum, [m for _, m in new]))
        return next_state(state, rows, [p for p, *_ in new], opt, bad, donate)


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    found_inf: Tensor,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """Run torch's kernel in place on params and buffers; it does nothing if ``found_inf`` is 1."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = lr.to(found_inf.device, torch.float32)  # read as float32 on the device
    torch._fused_sgd_(
        params,
        grads,
        buffers,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )


sgd = SGD()
