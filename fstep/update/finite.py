"""Is a step to be skipped? A gradient that is not finite must change nothing, and nobody may wait to find out.

skip given      a 0-d tensor, from whoever knows       finalize_grads has read every element for the norm
skip=None       is any element infinite or NaN?        one more pass over the gradients; a rank that has none must be told
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_skip(function: str, skip: Any, grads: Sequence[Tensor], recording: bool) -> Tensor:
    """Return a 0-d bool tensor on the gradients' device: what was given, or whether any element is infinite or NaN."""
    if skip is None:
        if not any(g.numel() for g in grads):
            raise ValueError(
                f"{function}: this rank holds no element of a gradient (all is frozen, or its pieces are empty), so that it "
                "cannot see which steps others skip; pass skip=metrics['nonfinite'] of finalize_grads"
            )
        return any_nonfinite(grads, recording)
    if not isinstance(skip, Tensor):
        raise TypeError(f"{function}: skip is {skip!r}; pass a 0-d tensor, e.g. metrics['nonfinite'] of finalize_grads")
    if skip.ndim:
        raise ValueError(f"{function}: skip has shape {tuple(skip.shape)}; pass a 0-d tensor, e.g. skip.any()")
    return skip.detach().to(grads[0].device if grads else skip.device, torch.bool)


def leaf_norms(leaves: Sequence[Tensor], order: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Stack the norms of the leaves (order not kept), by default float64 if a leaf is, else float32, in a few launches."""
    # An infinity norm of nothing is undefined, and an empty leaf adds nothing to any norm.
    some = [x for x in leaves if x.numel()]
    if not some:
        return torch.zeros(1, device=leaves[0].device, dtype=dtype)
    wide = [x for x in some if x.dtype == torch.float64]
    rest = [x for x in some if x.dtype != torch.float64] if wide else some
    norms: list[Tensor] = []
    for group, kind in ((rest, torch.float32), (wide, torch.float64)):
        if group:
            norms.extend(torch._foreach_norm(group, order, dtype=dtype or kind))
    if rest is not some or len({x.device for x in some}) > 1:
        norms = [n.to(leaves[0].device, norms[-1].dtype) for n in norms]
    return torch.stack(norms)


def any_nonfinite(grads: Sequence[Tensor], recording: bool) -> Tensor:
    """Return a 0-d bool tensor on the gradients' device: is any element infinite or NaN?"""
    if recording:
        return ~torch.stack([g.detach().isfinite().all().to(grads[0].device) for g in grads]).all()
    # A leaf is finite exactly if its largest magnitude is, or its least and its largest element.
    on_cpu: dict[torch.dtype, list[Tensor]] = {}
    elsewhere: list[Tensor] = []
    for g in grads:
        if g.device.type != "cpu":
            elsewhere.append(g)
        elif g.numel():
            # On the CPU the infinity norm takes 25 times as long; on a GPU one launch for all leaves is what counts.
            on_cpu.setdefault(g.dtype, []).extend(torch.aminmax(g))
    ends = [torch.stack(values) for values in on_cpu.values()]
    if elsewhere:
        ends.append(leaf_norms(elsewhere, math.inf))
    finite = [e.isfinite().all().to(grads[0].device) for e in ends]
    return ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=grads[0].device)
