"""`finalize_grads`: the one place that divides.

    sum of gradients  G           loss  Ratio(num, den)
          |                              |
          |   mean  G / den              |
          |   norm  ||G / den||          |  one multiplication a leaf:  G * (clip / den)
          |   clip  min(1, max / norm)   |
          v                              v
    gradients of the mean loss    metrics: loss, weight, grad_norm, nonfinite, ...

Gradients come out all finite or all NaN, and ``metrics["nonfinite"]`` says which. Whoever applies them (every rank, every
optimizer) then decides alike whether the step is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.axis import Axis, Mesh, require_single
from fstep.mesh.place import places
from fstep.ratio import Ratio
from fstep.trace import is_recording
from fstep.tree import check_type, tree_leaves, tree_map, tree_paths, tree_replace_leaves
from fstep.update.finite import leaf_norms
from fstep.update.memory import overlapping
from fstep.update.reduce import counted, everybody, norm_over_mesh, psum, sum_gradients

RESERVED = ("loss", "weight", "grad_norm", "nonfinite")


def finalize_grads(
    grads: Any,
    loss: Ratio | tuple[Ratio, Mapping[str, Ratio]],
    *,
    mesh: Mesh,
    max_norm: float | None = None,
    donate: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """Turn summed gradients into the gradients of the mean loss, clipped by their global norm.

    ``grads`` are the gradients of ``loss.num``, summed over the microbatches, with ``None`` at frozen leaves. With
    ``G = grads / loss.den`` and ``norm = ||G||`` over all leaves together (in float32, or in float64 if a leaf is; on a mesh
    in the dtype of the loss, from squares added in float64, which overflow later), the result is
    ``G * min(1, max_norm / (norm + 1e-6))``, which is `torch.nn.utils.clip_grad_norm_` of the mean.

    Returns the gradients, each in its own dtype, and metrics as 0-d tensors: ``loss`` (the mean), ``weight`` (the
    denominator), ``grad_norm`` (before clipping), ``nonfinite`` (0. or 1.), and the mean of each extra ratio of
    ``(Ratio, {name: Ratio})``. If ``den`` is 0 the gradients and the loss are 0; if the norm is not finite every
    gradient is NaN, and an optimizer skips the step. Nothing waits for the device. Outer derivatives and `vmap` go
    through. ``donate=True`` writes the result into the memory of ``grads``, where no sum over ranks has made new tensors.

    Every rank of the mesh calls this. ``loss`` and ``grads`` are *partial sums* over ``mesh.dp`` and ``mesh.cp``: what each
    rank computed from its own tokens, maybe none. Here they are added up, once, and with them the gradients of a `Copied`
    parameter over its stages; a ZeRO piece arrives added up over its axis. Over ``mesh.tp`` and ``mesh.pp`` the loss is
    *replicated* and each rank's gradients are those of what it holds. In the norm every parameter counts once, wherever it
    lives. The results are the same bits on all ranks that hold the same; metrics are *replicated* over the mesh.

    Raises `TypeError` if ``loss`` is no `Ratio` or a leaf is no floating-point tensor, `ValueError` if ``grads`` has no
    leaves, ``max_norm`` <= 0, or a ratio is named like one of the four metrics.

    >>> import torch, fstep
    >>> loss = fstep.Ratio(torch.tensor(12.0), torch.tensor(4.0))
    >>> grads, metrics = fstep.finalize_grads({"w": torch.tensor([12.0, 16.0])}, loss, mesh=fstep.Mesh(), max_norm=2.5)
    >>> grads["w"]  # the mean is (3, 4) and has norm 5
    tensor([1.5000, 2.0000])
    >>> {name: float(value) for name, value in metrics.items()}
    {'loss': 3.0, 'weight': 4.0, 'grad_norm': 5.0, 'nonfinite': 0.0}
    """
    check_type("finalize_grads", "mesh", mesh, Mesh, "Mesh(), or the mesh this runs over")
    require_single("finalize_grads", mesh.ep)
    total, extra = _ratios(loss)
    leaves = _leaves(grads, mesh)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"finalize_grads: max_norm is {max_norm}; pass a number > 0, or None not to clip")
    recording = is_recording(leaves, total.den)
    if donate and recording:
        raise ValueError(
            "finalize_grads: donate=True while an outer derivative is being taken (grads or loss require grad, or a "
            "torch.func transform is running); call it without donate=True, or detach what should not be differentiated"
        )

    given, mine = leaves, leaves
    if mesh.size > 1:
        where = places(grads)
        leaves = sum_gradients(leaves, where, mesh)
        total, extra = _sum_ratios(total, extra, mesh.over("dp", "cp"))
        mine = counted(leaves, where, mesh)
    if recording:
        square = _squares(mine, total.den)
        if mesh.size > 1:  # the ranks' own leaves may differ in dtype
            square = square.to(torch.promote_types(total.den.dtype, torch.float32))
        sum_norm = _root(psum(square, everybody(mesh), "psum of the norm"))
    elif mesh.size > 1:
        sum_norm = norm_over_mesh(mine, mesh, total.den)
    else:
        sum_norm = torch.linalg.vector_norm(leaf_norms(leaves, 2))
    # A sum over ranks is a new tensor, which nobody else holds; what needed none (a ZeRO piece) is still the caller's.
    own = [donate or x is not old for x, old in zip(leaves, given, strict=True)]
    den = total.den.to(sum_norm.device, sum_norm.dtype)
    # Without weight all is divided by infinity: finite sums become 0, and the others NaN.
    safe = torch.where(den != 0, den, math.inf)
    norm = (sum_norm / safe).abs()
    bad = ~(norm < math.inf)  # true for NaN
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(bad, math.nan, clip / safe)

    scaled = [_times(g, scale) for g in leaves] if recording else _scale(leaves, scale, own)
    metrics = {
        "loss": total.mean(),
        "weight": total.den,
        "grad_norm": norm,
        "nonfinite": bad.to(torch.float32),
        **{name: ratio.mean() for name, ratio in extra.items()},
    }
    return tree_replace_leaves(grads, scaled), metrics


def _ratios(loss: Any) -> tuple[Ratio, Mapping[str, Ratio]]:
    total, extra = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, {})
    if not isinstance(extra, Mapping):
        raise TypeError(f"finalize_grads: loss[1] is {type(extra).__name__}; pass a dict of Ratios")
    for name, ratio in (("loss", total), *extra.items()):
        if not isinstance(ratio, Ratio):
            raise TypeError(
                f"finalize_grads: {name} is {type(ratio).__name__}; pass Ratio(sum, weight) of 0-d tensors, "
                "or a pair of one and a dict of more"
            )
        for part in (ratio.num, ratio.den):
            if not isinstance(part, Tensor) or part.ndim:
                got = tuple(part.shape) if isinstance(part, Tensor) else repr(part)
                raise TypeError(f"finalize_grads: {name} is a Ratio of {got}; sum to 0-d tensors first")
    for name in extra:
        if name in RESERVED:
            raise ValueError(f"finalize_grads: a ratio is named {name!r}, as is a metric of its own; rename it")
    return total, extra


def _leaves(grads: Any, mesh: Mesh) -> list[Tensor]:
    leaves = tree_leaves(grads)
    if not leaves and mesh.pp.size == 1:  # a pipeline may have a stage that is frozen
        raise ValueError("finalize_grads: grads has no leaves; every parameter is frozen, or the tree is empty")
    for i, leaf in enumerate(leaves):
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided):
            kind: Any = type(leaf).__name__
            if isinstance(leaf, Tensor):
                kind = leaf.dtype if leaf.layout is torch.strided else leaf.layout
            raise TypeError(
                f"finalize_grads: the gradient {tree_paths(grads)[i]!r} is {kind}; pass dense floating-point tensors or None"
            )
    return leaves


def _sum_ratios(total: Ratio, extra: Mapping[str, Ratio], axis: Axis) -> tuple[Ratio, dict[str, Ratio]]:
    """Add up the loss and the other ratios; ranks that name others, or in another order, find out here."""
    names, ratios = ["loss", *sorted(extra)], [total, *(extra[n] for n in sorted(extra))]
    title = f"psum of {', '.join(names)}"
    summed = {n: tree_map(lambda x: psum(x, axis, title), r) for n, r in zip(names, ratios, strict=True)}
    return summed.pop("loss"), {n: summed[n] for n in extra}


def _squares(leaves: Sequence[Tensor], like: Tensor) -> Tensor:
    """Add up all squares in operations that can be differentiated, float64 if a leaf is, else float32."""
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in leaves]
    wide = torch.float64 if any(s.dtype == torch.float64 for s in squares) else torch.float32
    return torch.stack([s.to(like.device, wide) for s in squares]).sum() if squares else like.new_zeros((), dtype=wide)


def _root(square: Tensor) -> Tensor:
    """Take the root; its higher derivatives are right at 0 too."""
    some = square != 0  # true for NaN, so that the root is NaN
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def _times(g: Tensor, scale: Tensor) -> Tensor:
    # In float16 a scale of 1e-6 has lost most of its digits: multiply in float32 and round once.
    wide = torch.promote_types(g.dtype, torch.float32)
    return (g.to(wide) * scale.to(g.device, wide)).to(g.dtype)


def _times_into(out: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    if not g.ndim:
        return out.copy_(_times(g, scale))
    # With one dimension the scale takes part in type promotion: float32 inside one kernel, and no copy in float32.
    return torch.mul(g, scale.to(g.device, torch.float32)[None], out=out)


def _scale(leaves: Sequence[Tensor], scale: Tensor, own: Sequence[bool]) -> list[Tensor]:
    """Multiply every leaf by a 0-d tensor, a few launches for all of them; in place those that are our ``own``."""
    out: list[Tensor] = list(leaves)
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    # Autograd may return one tensor for two leaves, views of one, an expanded one: in place they would be scaled twice.
    shared = overlapping(leaves) if any(own) else ()
    for i, g in enumerate(leaves):
        in_place = own[i] and i not in shared
        if g.dtype in (torch.float32, torch.float64):
            groups.setdefault((g.device, g.dtype, in_place), []).append(i)
        else:
            out[i] = _times_into(g if in_place else torch.empty_like(g), g, scale)
    for (device, dtype, in_place), members in groups.items():
        group = [leaves[i] for i in members]
        factor = scale.to(device, dtype)
        if in_place:
            torch._foreach_mul_(group, factor)
            continue
        for i, x in zip(members, torch._foreach_mul(group, factor), strict=True):
            out[i] = x
    return out
