"""Learning rates as functions of the step: no object, no counter, nothing to save.

    warmup_cosine              wsd                            lr = warmup_cosine(state.step, peak=3e-4, ...)
        .-.                      .----------.                 state = adamw.update(state, grads, lr=lr)
      .'   '.                   /            \\
     /       '-.___            /              \\___
    0 warmup   total          0 warmup   total-decay total

Every function here takes the number of steps done so far (an int or a 0-d tensor, e.g. ``state.step``; the first update
asks for step 0) and returns a 0-d float32 tensor (float64 for a float64 step). It never waits for the device, and works
under `vmap` and `torch.compile`. No update is wasted: step 0 gets ``peak / warmup``, not 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def constant(step: int | Tensor, *, peak: float) -> Tensor:
    """Return ``peak`` at every step.

    >>> import fstep
    >>> fstep.constant(7, peak=0.5)
    tensor(0.5000)
    """
    _check("constant", peak)
    return torch.full_like(_number("constant", step), peak)


def warmup_cosine(step: int | Tensor, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> Tensor:
    """Climb to ``peak`` in ``warmup`` steps, then follow half a cosine down to ``floor`` at ``total``.

    ::

        step < warmup     peak (step + 1) / warmup                       step warmup - 1 has the peak
        step < total      floor + (peak - floor) (1 + cos(pi f)) / 2     f = (step - warmup) / (total - warmup)
        else              floor

    Raises `ValueError` unless ``0 <= warmup <= total``, ``total > 0`` and ``0 <= floor <= peak``.

    >>> import fstep
    >>> [round(float(fstep.warmup_cosine(s, peak=1.0, warmup=2, total=6)), 3) for s in range(8)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    _check("warmup_cosine", peak, warmup, total, floor)
    s = _number("warmup_cosine", step)
    fall = (1 + torch.cos(math.pi * (s - warmup) / max(total - warmup, 1))) / 2
    return _piecewise(s, floor + (peak - floor) * fall, peak, warmup, total, floor)


def warmup_linear(step: int | Tensor, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> Tensor:
    """Climb to ``peak`` in ``warmup`` steps, then fall in a straight line to ``floor`` at ``total``.

    ::

        step < warmup     peak (step + 1) / warmup                       step warmup - 1 has the peak
        step < total      floor + (peak - floor) (total - step) / (total - warmup)
        else              floor

    Raises `ValueError` unless ``0 <= warmup <= total``, ``total > 0`` and ``0 <= floor <= peak``.

    >>> import fstep
    >>> [float(fstep.warmup_linear(s, peak=1.0, warmup=2, total=6)) for s in range(8)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check("warmup_linear", peak, warmup, total, floor)
    s = _number("warmup_linear", step)
    return _piecewise(s, floor + (peak - floor) * (total - s) / max(total - warmup, 1), peak, warmup, total, floor)


def wsd(step: int | Tensor, *, peak: float, warmup: int, total: int, decay: int, floor: float = 0.0) -> Tensor:
    """Warm up, stay, decay: climb in ``warmup`` steps, hold ``peak``, fall in a straight line in the last ``decay``.

    ::

        step < warmup          peak (step + 1) / warmup                  step warmup - 1 has the peak
        step < total - decay   peak
        step < total           floor + (peak - floor) (total - step) / decay
        else                   floor

    Raises `ValueError` unless ``warmup`` and ``decay`` are >= 0 and fit into ``total`` together, ``total > 0`` and
    ``0 <= floor <= peak``.

    >>> import fstep
    >>> [float(fstep.wsd(s, peak=1.0, warmup=2, total=6, decay=2)) for s in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    _check("wsd", peak, warmup, total, floor)
    if decay < 0 or warmup + decay > total:
        raise ValueError(
            f"wsd: warmup={warmup} and decay={decay} steps do not fit into total={total}; pass 0 <= decay <= total - warmup"
        )
    s = _number("wsd", step)
    return _piecewise(s, floor + (peak - floor) * ((total - s) / max(decay, 1)).clamp(max=1), peak, warmup, total, floor)


def _piecewise(s: Tensor, middle: Tensor, peak: float, warmup: int, total: int, floor: float) -> Tensor:
    climb = peak * (s + 1) / max(warmup, 1)
    return torch.where(s < warmup, climb, torch.where(s < total, middle, floor))


def _number(function: str, step: int | Tensor) -> Tensor:
    if isinstance(step, Tensor):
        if step.ndim:
            raise ValueError(f"{function}: step has shape {tuple(step.shape)}; pass an int or a 0-d tensor, or use vmap")
        return step if step.dtype == torch.float64 else step.to(torch.float32)
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{function}: step is {step!r}; pass an int or a 0-d tensor, e.g. state.step")
    return torch.tensor(step, dtype=torch.float32)


def _check(function: str, peak: float, warmup: int = 0, total: int = 1, floor: float = 0.0) -> None:
    if not 0 <= floor <= peak < math.inf:
        raise ValueError(f"{function}: peak is {peak} and floor is {floor}; pass finite numbers, 0 <= floor <= peak")
    if total <= 0:
        raise ValueError(f"{function}: total is {total}; pass the number of steps of the whole run, > 0")
    if not 0 <= warmup <= total:
        raise ValueError(f"{function}: warmup is {warmup} of total={total} steps; pass 0 <= warmup <= total")
