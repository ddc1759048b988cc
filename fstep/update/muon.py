"""Muon for the matrices inside the layers, AdamW for everything else.

    layers.0.q   (n, m)        momentum -> orthogonalise -> step          Muon
    layers.0.w   (e, n, m)     the same, each of the e matrices alone     Muon, if ``matrices`` chooses it
    embed, head, norms                                                    ``rest``, an `AdamW`

Muon replaces a matrix of momentum ``U S V^T`` by about ``U V^T``: every direction moves equally far, however small its
gradient (Jordan et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from fstep.grad.autodiff import Predicate
from fstep.grad.messages import device_of
from fstep.mesh.place import places
from fstep.state.state import TrainState
from fstep.tree import pytree, tree_map, tree_map_with_path, tree_replace_leaves
from fstep.update.adamw import AdamW, AdamWState, adamw_rows, adamw_zeros
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
    whole_of,
)

# Rounding to bfloat16 changes the result by a few percent of a step, which training does not notice and speed does.
NEWTON_SCHULZ_DTYPE = torch.bfloat16


def hidden_matrices(path: str, leaf: Tensor) -> bool:
    """Choose the matrices inside the layers, which is what `Muon` is meant for.

    >>> import torch, fstep
    >>> fstep.hidden_matrices("layers.0.q", torch.ones(2, 2)), fstep.hidden_matrices("embed", torch.ones(2, 2))
    (True, False)
    """
    return leaf.ndim == 2 and "layers" in path.split(".")


@pytree
class MuonState:
    """What Muon remembers: momentum of the matrices it orthogonalises, and ``rest``, an `AdamWState` of all others.

    Each trained leaf is in exactly one of the two and ``None`` in the other.

    >>> import torch, fstep
    >>> opt = fstep.muon.init({"embed": torch.ones(1), "layers": {0: {"q": torch.ones(1, 1)}}})
    >>> opt.momentum
    {'embed': None, 'layers': {0: {'q': tensor([[0.]])}}}
    >>> opt.rest.mu
    {'embed': tensor([0.]), 'layers': {0: {'q': None}}}
    """

    momentum: Any
    rest: AdamWState


@dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalised by Newton and Schulz's iteration in bfloat16, equal to `torch.optim.Muon`.

    With gradient ``g`` of an (n, m) matrix and ``(a, b, c) = ns_coefficients``::

        M = momentum M + (1 - momentum) g
        U = (1 - momentum) g + momentum M   if nesterov, else  M
        X = U / ||U||,  ns_steps times:  A = X X^T,  X = a X + (b A + c A A) X
        p = p - lr weight_decay p           (leaves that ``decay`` chooses)
        p = p - lr scale X                  scale = sqrt(max(1, n / m))        adjust_lr="original"
                                                    0.2 sqrt(max(n, m))        adjust_lr="match_rms_adamw"

    ``matrices(path, leaf)`` chooses at `init` what is treated so: leaves of two dimensions, or of three (a stack of
    matrices, e.g. experts). The others are updated by ``rest``, with its own weight decay and learning rate
    ``lr * rest_lr``. Raises `ValueError` for momentum outside [0, 1), ``ns_steps`` < 1, what is negative or unknown.

    >>> import torch, fstep
    >>> state = fstep.init_state({"layers": {0: {"q": torch.zeros(2, 3)}}, "scale": torch.ones(1)}, fstep.muon)
    >>> grads = {"layers": {0: {"q": torch.ones(2, 3)}}, "scale": torch.ones(1)}
    >>> state = fstep.muon.update(state, grads, lr=0.1)
    >>> state.params["scale"]
    tensor([0.9000])
    >>> state.params["layers"][0]["q"].shape
    torch.Size([2, 3])
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    decay: Decay | None = None
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    matrices: Callable[[str, Tensor], bool] = hidden_matrices
    rest: AdamW = field(default_factory=AdamW)
    rest_lr: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, f"Muon: momentum is {self.momentum}; pass a number in [0, 1)")
        require(self.weight_decay >= 0, f"Muon: weight_decay is {self.weight_decay}; pass a number >= 0")
        require(self.ns_steps >= 1, f"Muon: ns_steps is {self.ns_steps}; pass 1 or more, e.g. 5")
        require(len(self.ns_coefficients) == 3, f"Muon: ns_coefficients is {self.ns_coefficients}; pass three numbers")
        require(self.eps > 0, f"Muon: eps is {self.eps}; pass a number > 0, e.g. 1e-7")
        require(self.rest_lr >= 0, f"Muon: rest_lr is {self.rest_lr}; pass a number >= 0")
        require(
            self.adjust_lr in ("original", "match_rms_adamw"),
            f"Muon: adjust_lr is {self.adjust_lr!r}; pass 'original' or 'match_rms_adamw'",
        )

    def init(self, params: Any, *, trainable: Predicate | None = None) -> MuonState:
        """Return zero momentum for what ``matrices`` chooses of the trained leaves, and `AdamW.init` of the others.

        Raises `TypeError` for a trained leaf that is not floating-point, `ValueError` for params without leaves or if
        ``matrices`` chooses a leaf that is neither a matrix nor a stack of them, or of which this rank holds only a part.

        >>> import torch, fstep
        >>> fstep.muon.init({"layers": {0: {"q": torch.ones(1, 2)}}}).momentum
        {'layers': {0: {'q': tensor([[0., 0.]])}}}
        """
        chosen = select("muon.init", params, trainable)

        def orthogonalised(path: str, leaf: Tensor) -> bool:
            place = next(where)
            is_hidden = bool(self.matrices(path, whole_of(leaf, place)))
            require(
                not is_hidden or not place.axes,
                f"muon.init: `matrices` chose {path!r}, of which this rank holds a part over axis "
                f"{place.axes[-1].name if place.axes else ''!r}, and Muon needs whole matrices; keep them whole on every "
                "rank, or let `matrices` leave out what shard_params or a tensor-parallel mesh has cut",
            )
            require(
                not is_hidden or leaf.ndim in (2, 3),
                f"muon.init: `matrices` chose {path!r}, which has {leaf.ndim} dimensions; "
                "choose leaves of 2, or of 3 for a stack of matrices",
            )
            return is_hidden

        where = iter(places(chosen))
        hidden = tree_map_with_path(orthogonalised, chosen)
        others = tree_map(lambda leaf, is_hidden: None if is_hidden else leaf, chosen, hidden)
        return MuonState(
            momentum=tree_map(lambda leaf, is_hidden: torch.zeros_like(leaf) if is_hidden else None, chosen, hidden),
            rest=adamw_zeros(others, device_of(params)),
        )

    def update(
        self, state: TrainState, grads: Any, *, lr: float | Tensor, skip: Tensor | None = None, donate: bool = False
    ) -> TrainState:
        """Take one step; arguments, skipping, donation and errors are those of `AdamW.update`.

        >>> import torch, fstep
        >>> state = fstep.init_state({"layers": {0: {"q": torch.zeros(1, 1)}}}, fstep.muon)
        >>> grads = {"layers": {0: {"q": torch.full((1, 1), torch.inf)}}}
        >>> int(fstep.muon.update(state, grads, lr=0.1).skipped)
        1
        """
        check_update("muon", state, lr, MuonState)
        memory = state.opt
        rows = line_up("muon.update", state, grads, memory.momentum, memory.rest.mu, memory.rest.nu)
        hidden = [row._replace(slots=row.slots[:1]) for row in trained(rows) if row.slots[0] is not None]
        others = [row._replace(slots=row.slots[1:]) for row in trained(rows) if row.slots[0] is None]
        recording = rows_recording([*hidden, *others], memory.rest.count, lr)
        if donate:
            refuse_donation("muon.update", [*hidden, *others], grads, recording)
        bad = to_skip("muon.update", skip, [row.grad for row in trained(rows)], recording)

        def formula(p: Tensor, g: Tensor, slots: tuple[Tensor, ...], weight_decay: float) -> tuple[Tensor, Tensor]:
            momentum = torch.lerp(slots[0], g, 1 - self.momentum)
            step = torch.lerp(g, momentum, self.momentum) if self.nesterov else momentum
            step = _orthogonalise(step, self.ns_coefficients, self.ns_steps, self.eps).to(p.dtype)
            return p * (1 - lr * weight_decay) - lr * self._scale(p) * step, momentum

        moved = update_rows(
            hidden,
            bad,
            formula,
            None,
            weight_decays=decays(grads, hidden, self.weight_decay, self.decay),
            donate=donate,
            recording=recording,
        )
        rest_params, rest = adamw_rows(
            self.rest, others, grads, memory.rest, bad, lr=lr * self.rest_lr, donate=donate, recording=recording
        )
        hidden_params, rest_new = iter(p for p, _ in moved), iter(rest_params)
        params = [next(rest_new if row.slots[0] is None else hidden_params) for row in trained(rows)]
        momentum = memory.momentum if donate else tree_replace_leaves(memory.momentum, [m for _, m in moved])
        opt = MuonState(momentum, rest)
        return next_state(state, rows, params, opt, bad, donate)

    def _scale(self, matrix: Tensor) -> float:
        n, m = matrix.shape[-2:]
        return sqrt(max(1, n / m)) if self.adjust_lr == "original" else 0.2 * sqrt(max(n, m))


def _orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of a matrix, or of each matrix of a stack, near 1 (between about 0.5 and 1.5)."""
    a, b, c = coefficients
    x = matrix.to(NEWTON_SCHULZ_DTYPE)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the square A is then the smaller of the two
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    # beta * first + alpha * (second @ third), rounded once.
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        square = x @ x.mT
        polynomial = fused(square, square, square, beta=b, alpha=c)
        x = fused(x, polynomial, x, beta=a)
    return x.mT if tall else x


muon = Muon()
