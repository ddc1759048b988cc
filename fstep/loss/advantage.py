"""Advantages: how much better an answer was than could be expected.

    prompt    0    0    0  |  1    1  |  2           groups [documents]
    reward    1    0    0  |  1    1  |  1           rewards [documents]
    mean     2/3 -1/3 -1/3 |  0    0  |  0           minus the mean of the group
    others    1  -1/2 -1/2 |  0    0  |  0           minus the mean of the others

A group in which all answers are equally good teaches nothing, and neither does a group of one: exactly 0, and no NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fstep.loss.weigh import counted
from fstep.mesh.axis import Axis, check_axis
from fstep.mesh.collectives import psum, pvary
from fstep.tree import check_type


def _root(square: Tensor) -> Tensor:
    """Take the root, whose gradient at 0 is 0 here."""
    some = square > 0
    return torch.where(some, torch.where(some, square, 1).sqrt(), 0)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    baseline: Literal["mean", "others"] | None = "mean",
    scale: Literal["group", "batch"] | None = "group",
    eps: float = 1e-6,
) -> Tensor:
    """Return ``(reward - baseline) / (std + eps)`` of each answer: [documents]. ``groups`` says which prompt it answers.

    The baseline is the ``"mean"`` of the answer's group, of the ``"others"`` of the group (leave one out), or None. The
    scale is the standard deviation (over n - 1) of the rewards of the ``"group"`` or of the whole ``"batch"``, or None::

        GRPO (arXiv:2402.03300)       baseline="mean",   scale="group"
        Dr. GRPO (arXiv:2503.20783)   baseline="mean",   scale=None
        RLOO (arXiv:2402.14740)       baseline="others", scale=None
        Lite PPO (arXiv:2508.08221)   baseline="mean",   scale="batch"
        REINFORCE++-baseline (arXiv:2501.03262)   baseline="mean", scale=None, then `whiten` over all tokens

    With a baseline, a group of equal rewards has advantages of exactly 0, and so has a group of one: it has nothing to be
    compared with. Groups are any integers in any order. Call it with whole groups, before documents are divided over ranks;
    with ``scale="batch"`` with the whole batch.

    Raises ValueError for shapes that differ, unknown names and a scale without a baseline, TypeError for groups that are no
    integers.

    >>> import torch, fstep
    >>> rewards, groups = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 5.0]), torch.tensor([7, 7, 7, 3, 3, 4])
    >>> fstep.group_advantages(rewards, groups)
    tensor([ 1.1547, -0.5773, -0.5773,  0.0000,  0.0000,  0.0000])
    >>> fstep.group_advantages(rewards, groups, baseline="others", scale=None)
    tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000,  0.0000])
    """
    function = "group_advantages"
    check_type(function, "rewards", rewards, Tensor, "a tensor with one reward a document")
    check_type(function, "groups", groups, Tensor, "a tensor with one integer a document")
    if rewards.dim() != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"{function}: rewards have shape {tuple(rewards.shape)}, groups {tuple(groups.shape)}; one of each a document"
        )
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"{function}: groups are {groups.dtype}; pass integers, equal for answers to one prompt")
    if baseline not in ("mean", "others", None):
        raise ValueError(f'{function}: baseline is {baseline!r}; pass "mean", "others" or None')
    if scale not in ("group", "batch", None):
        raise ValueError(f'{function}: scale is {scale!r}; pass "group", "batch" or None')
    if baseline is None and scale is not None:
        raise ValueError(
            f"{function}: scale is {scale!r} without a baseline, and equal rewards would be divided by 0; pass scale=None, "
            "or a baseline"
        )
    x = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    # Groups are numbered in sorted order, on the device: there are at most as many as documents.
    ordered, order = groups.sort(stable=True)
    fresh = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    group = torch.empty_like(fresh).index_copy(0, order, fresh)
    first = order[torch.searchsorted(fresh, group)]

    def add(values: Tensor) -> Tensor:
        return values.new_zeros(len(group)).index_add(0, group, values)[group]

    # From the first reward of the group on, equal rewards are exactly 0; their mean would be off by a rounding.
    n, y = add(torch.ones_like(x)), x - x[first]
    total = add(y)
    if baseline is None:
        centred = x
    elif baseline == "mean":
        centred = y - total / n
    else:
        centred = torch.where(n > 1, y - (total - y) / (n - 1).clamp(min=1), 0)
    if scale is None:
        return centred
    if scale == "group":
        return centred / (_root(add((y - total / n).square()) / (n - 1).clamp(min=1)) + eps)
    z = x - x[:1]
    square = (z - z.sum() / max(len(z), 1)).square().sum() / max(len(z) - 1, 1)
    return centred / (_root(square) + eps)


def whiten(values: Tensor, weights: Tensor, *, eps: float = 1e-8, axis: Axis | None = None) -> Tensor:
    """Return ``(value - mean) / sqrt(variance + eps)`` over all tokens that carry weight, 0 elsewhere: [tokens].

    Mean and variance are those of the weights, over ``sum(weights)``, and computed in float64, so that equal values become
    0. That is how REINFORCE++ (arXiv:2501.03262) and PPO scale advantages; call it with the whole batch, before it is split.
    If ranks hold different tokens, ``axis`` is theirs (``mesh.over("dp", "cp")``), and sums are added up over it. Input and
    output: shards.

    Raises ValueError for shapes that differ.

    >>> import torch, fstep
    >>> fstep.whiten(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1.0, 1.0, 0.0]))
    tensor([-1.,  1.,  0.])
    """
    function = "whiten"
    if axis is not None:
        check_axis(function, axis)
    mask, weights, (values,) = counted(function, weights, values=values)
    # In float32 the mean of equal values is not that value, and by sqrt(eps) the difference is far from 0.
    x, w = values.double(), weights.double()

    def add(x: Tensor) -> Tensor:
        total = x.sum()
        return total if axis is None else pvary(psum(total, axis=axis), axis=axis)

    den = add(w)
    den = torch.where(den != 0, den, 1)
    centred = torch.where(mask, x - add(w * x) / den, 0)
    return (centred * (add(w * centred.square()) / den + eps).rsqrt()).to(values.dtype)
