"""Forward and backward over microbatches: one call returns the summed loss and its gradients.

    microbatch 0  forward  backward ─┐
    microbatch 1  forward  backward ─┼─ one set of gradients, added up in place
    microbatch 2  forward  backward ─┘

A model is a ``stage_fn(params, x, microbatch)``: it runs whatever parts its params have, on the input ``x`` it is sent, or
on the microbatch's own tokens when ``x`` is ``None``. What follows the last stage is a ``loss_fn(params, x, microbatch)``.
This release runs one stage, on an axis of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fstep.grad.autodiff import (
    Predicate,
    backward_into,
    detach,
    private_leaf,
    read_grads,
    refuse_inference_mode,
    split_trainable,
    value_and_grad,
)
from fstep.mesh.axis import Axis, require_single
from fstep.ratio import Ratio
from fstep.trace import is_recording
from fstep.tree import check_callable, check_type, tree_leaves, tree_map, tree_merge, tree_replace_leaves

Metrics = dict[str, Ratio]
Loss = Ratio | tuple[Ratio, Metrics]
SCHEDULES = ("gpipe", "1f1b")


def _split(out: Any) -> tuple[Any, Metrics]:
    """Take a result apart that may come with a dict of named Ratios beside it."""
    pair = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)
    return out if pair and all(isinstance(r, Ratio) for r in out[1].values()) else (out, {})


def _run(stage_fn: Callable, loss_fn: Callable, params: Any, microbatch: Any) -> tuple[Ratio, Metrics]:
    """Run one microbatch; auxiliary losses join the sum that is differentiated, and are reported under their names."""
    x, aux = _split(stage_fn(params, None, microbatch))
    out = loss_fn(params, x, microbatch)
    loss, metrics = _split(out)
    if not isinstance(loss, Ratio):
        raise TypeError(
            f"pp_forward_backward: loss_fn returned a {type(out).__name__}; return Ratio(sum, weight), or a pair of that "
            "and a dict of named Ratios"
        )
    for name, ratio in (("the loss", loss), *metrics.items(), *aux.items()):
        for part in (ratio.num, ratio.den):
            if not isinstance(part, Tensor) or part.dim():
                what = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"pp_forward_backward: {name} is a Ratio with a part of {what}; sum it to a 0-d tensor")
    if both := sorted(aux.keys() & metrics.keys()):
        raise ValueError(f"pp_forward_backward: {both} are names of auxiliary losses and of metrics; rename one of each")
    num = loss.num + sum(r.num for r in aux.values()) if aux else loss.num
    return Ratio(num, loss.den), {**metrics, **aux}


def _add(a: Any, b: Any) -> Any:
    return b if a is None else tree_map(torch.add, a, b)


def _add_pair(total: tuple[Ratio, Metrics] | None, pair: tuple[Ratio, Metrics]) -> tuple[Ratio, Metrics]:
    if total is not None and total[1].keys() != pair[1].keys():
        raise ValueError(
            f"pp_forward_backward: a microbatch has metrics {sorted(pair[1])} and the first has {sorted(total[1])}; give "
            "all of them the same, a Ratio of zeros where there is nothing"
        )
    return _add(total, pair)


def _check(function: str, microbatches: Any, axis: Axis, schedule: str) -> None:
    check_type(function, "axis", axis, Axis, "an axis of the mesh, e.g. mesh.pp")
    require_single(function, axis)
    if schedule not in SCHEDULES:
        raise ValueError(f"{function}: schedule {schedule!r} is unknown; pass one of {', '.join(SCHEDULES)}")
    if not isinstance(microbatches, Sequence):
        raise TypeError(
            f"{function}: microbatches is a {type(microbatches).__name__}; pass a sequence, e.g. [batch] for a single one"
        )
    if not microbatches:
        raise ValueError(f"{function}: there are no microbatches; pass at least one")


def pp_forward_backward(
    stage_fn: Callable[[Any, Any, Any], Any],
    loss_fn: Callable[[Any, Any, Any], Loss],
    params: Any,
    microbatches: Sequence[Any],
    *,
    axis: Axis = Axis("pp"),  # noqa: B008 -- immutable
    schedule: str = "1f1b",
    trainable: Predicate | None = None,
) -> tuple[Loss, Any]:
    """Sum the loss over microbatches and return it with the gradients of that sum.

    ``loss_fn`` returns a `Ratio`, or ``(Ratio, metrics)`` with a dict of named Ratios; ``stage_fn`` may return ``(x, aux)``
    where ``aux`` is a dict of Ratios that are added to the loss. The result is ``(Ratio, grads)``, or
    ``((Ratio, metrics), grads)`` if there are metrics or auxiliary losses. Ratios are summed over the microbatches; the
    gradients are those of the summed ``num``, undivided: `finalize_grads` divides. A leaf that ``trainable(path)`` refuses
    has gradient ``None``.

    Raises TypeError or ValueError, naming the fix, for a loss that is no Ratio of 0-d tensors, metrics that differ from
    microbatch to microbatch or clash with an auxiliary loss, no microbatches, an unknown schedule; NotImplementedError for
    an axis of more than one rank.

    Inputs: params and microbatches of this rank's stage. Outputs, on an axis of size 1: the loss and gradients of the whole
    model.

    >>> import torch, fstep
    >>> stage = lambda params, x, mb: mb * params["w"]
    >>> loss = lambda params, x, mb: fstep.Ratio((x**2).sum(), torch.tensor(float(len(x))))
    >>> params = {"w": torch.tensor(3.0)}
    >>> fstep.pp_forward_backward(stage, loss, params, [torch.tensor([1.0, 2.0]), torch.tensor([1.0])])
    (Ratio(num=tensor(54.), den=tensor(3.)), {'w': tensor(36.)})
    """
    check_callable("pp_forward_backward", "stage_fn", stage_fn)
    check_callable("pp_forward_backward", "loss_fn", loss_fn)
    _check("pp_forward_backward", microbatches, axis, schedule)
    total: Any = None

    if is_recording(params, list(microbatches)):
        grads: Any = None
        take = value_and_grad(lambda p, mb: _run(stage_fn, loss_fn, p, mb), has_aux=True, trainable=trainable)
        for microbatch in microbatches:
            pair, new = take(params, microbatch)
            total, grads = _add_pair(total, pair), _add(grads, new)
    else:
        refuse_inference_mode("pp_forward_backward")
        pick, rest = split_trainable(params, trainable)
        with torch.enable_grad():
            leaves = [private_leaf(x, recording=False) for x in tree_leaves(pick)]
            private = tree_merge(tree_replace_leaves(pick, leaves), detach(rest))
            for microbatch in microbatches:
                pair = _run(stage_fn, loss_fn, private, microbatch)
                backward_into([pair[0].num], None, leaves)
                total = _add_pair(total, detach(pair))
        grads = tree_replace_leaves(pick, read_grads(leaves))

    loss, metrics = total
    return ((loss, metrics) if metrics else loss), grads


def pp_forward(
    stage_fn: Callable[[Any, Any, Any], Any],
    fn: Callable[[Any, Any, Any], Any],
    params: Any,
    microbatches: Sequence[Any],
    *,
    axis: Axis = Axis("pp"),  # noqa: B008 -- immutable
    schedule: str = "1f1b",
) -> tuple[Any, ...]:
    """Run the model without gradients and return ``fn(params, x, microbatch)`` for every microbatch, in order.

    For evaluation (``fn`` is the loss, and the sum of the Ratios is the validation loss) and scoring (``fn`` returns log
    probabilities). Auxiliary losses of the stages are left out.

    >>> import torch, fstep
    >>> stage = lambda params, x, mb: mb * params["w"]
    >>> fstep.pp_forward(stage, lambda p, x, mb: x.sum(), {"w": torch.tensor(3.0)}, [torch.ones(2), torch.ones(1)])
    (tensor(6.), tensor(3.))
    """
    check_callable("pp_forward", "stage_fn", stage_fn)
    check_callable("pp_forward", "fn", fn)
    _check("pp_forward", microbatches, axis, schedule)
    results = []
    with torch.no_grad():
        for microbatch in microbatches:
            x, _ = _split(stage_fn(params, None, microbatch))
            results.append(fn(params, x, microbatch))
    return tuple(results)
