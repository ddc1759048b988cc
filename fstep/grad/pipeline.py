"""Forward and backward over microbatches: one call returns the summed loss and its gradients.

    one rank        microbatch 0  forward  backward ─┐
                    microbatch 1  forward  backward ─┼─ one set of gradients, added up in place
                    microbatch 2  forward  backward ─┘

    a pipeline      every rank runs its stages in the order of a `Schedule`, and returns its own stages' gradients

A model is a ``stage_fn(params, x, microbatch)``: it runs whatever parts its params have, on the input ``x`` it is sent, or
on the microbatch's own tokens when ``x`` is ``None``. What follows the last stage is a ``loss_fn(params, x, microbatch)``.
Every rank has all microbatches: masks and positions are arguments, and only what a stage computes is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fstep.grad.autodiff import (
    Predicate,
    backward_into,
    detach,
    refuse_inference_mode,
    value_and_grad,
)
from fstep.grad.by_name import ScheduleLike, schedule_for
from fstep.grad.interpret import Metrics, Run, add_up, join_stages
from fstep.grad.messages import broadcast_results, device_of, sum_ratios, tensors_of
from fstep.grad.own import Own, Walk
from fstep.grad.parts import stage_parts
from fstep.grad.schedule import Schedule
from fstep.mesh.axis import Axis
from fstep.mesh.exchange import transport
from fstep.mesh.place import Stages
from fstep.ratio import Ratio
from fstep.trace import is_recording
from fstep.tree import check_callable, check_type, tree_map

Loss = Ratio | tuple[Ratio, Metrics]


def _split(out: Any) -> tuple[Any, Metrics]:
    """Take a result apart that may come with a dict of named Ratios beside it."""
    pair = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)
    return out if pair and all(isinstance(r, Ratio) for r in out[1].values()) else (out, {})


def _check_ratios(ratios: Mapping[str, Ratio]) -> None:
    for name, ratio in ratios.items():
        for part in (ratio.num, ratio.den):
            if not isinstance(part, Tensor) or part.dim():
                what = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"pp_forward_backward: {name} is a Ratio with a part of {what}; sum it to a 0-d tensor")


def _run_stage(stage_fn: Callable, params: Any, x: Any, microbatch: Any) -> tuple[Any, Metrics]:
    y, aux = _split(stage_fn(params, x, microbatch))
    _check_ratios(aux)
    return y, aux


def _run_loss(loss_fn: Callable, params: Any, x: Any, microbatch: Any) -> tuple[Ratio, Metrics]:
    out = loss_fn(params, x, microbatch)
    loss, metrics = _split(out)
    if not isinstance(loss, Ratio):
        raise TypeError(
            f"pp_forward_backward: loss_fn returned a {type(out).__name__}; return Ratio(sum, weight), or a pair of that "
            "and a dict of named Ratios"
        )
    _check_ratios({"the loss": loss, **metrics})
    return loss, metrics


def _join(loss: Ratio, metrics: Metrics, aux: Metrics) -> tuple[Ratio, Metrics]:
    """Add auxiliary losses to the sum that is differentiated, and report them under their names."""
    if both := sorted(aux.keys() & metrics.keys()):
        raise ValueError(f"pp_forward_backward: {both} are names of auxiliary losses and of metrics; rename one of each")
    num = loss.num + sum(r.num for r in aux.values()) if aux else loss.num
    return Ratio(num, loss.den), {**metrics, **aux}


def _run(stage_fn: Callable, loss_fn: Callable, params: Any, last: Any, microbatch: Any) -> tuple[Ratio, Metrics]:
    """Run the whole model on one microbatch; ``last`` are the params that the loss takes."""
    x, aux = _run_stage(stage_fn, params, None, microbatch)
    return _join(*_run_loss(loss_fn, last, x, microbatch), aux)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else tree_map(torch.add, a, b)


def _same_names(metrics: Sequence[Metrics]) -> None:
    for more in metrics:
        if more.keys() != metrics[0].keys():
            raise ValueError(
                f"pp_forward_backward: a microbatch has metrics {sorted(more)} and the first has {sorted(metrics[0])}; give "
                "all of them the same, a Ratio of zeros where there is nothing"
            )


def _add_pair(total: tuple[Ratio, Metrics] | None, pair: tuple[Ratio, Metrics]) -> tuple[Ratio, Metrics]:
    if total is not None:
        _same_names([total[1], pair[1]])
    return _add(total, pair)


def _check(
    function: str, params: Any, microbatches: Any, axis: Axis, schedule: ScheduleLike, *, forward: bool = False
) -> Schedule | None:
    """Return the table to follow, or None where a single rank simply takes one microbatch after the other."""
    check_type(function, "axis", axis, Axis, "an axis of the mesh, e.g. mesh.pp")
    if not isinstance(microbatches, Sequence):
        raise TypeError(
            f"{function}: microbatches is a {type(microbatches).__name__}; pass a sequence, e.g. [batch] for a single one"
        )
    if not microbatches:
        raise ValueError(f"{function}: there are no microbatches; pass at least one")
    if axis.size == 1 and not isinstance(schedule, Schedule) and not isinstance(params, Stages):
        # A single rank needs no table, but what is no schedule is none on one rank either.
        if not callable(schedule):
            schedule_for(function, schedule, 1, 1, forward=True)
        return None
    table = schedule_for(function, schedule, axis.size, len(microbatches), forward=forward)
    if not forward and all(a.kind == "F" for row in table.actions for a in row):
        raise ValueError(
            f"{function}: schedule {table.name!r} has no backward pass, so that all gradients would be 0; pass the table "
            "that forward_only() was made from, or call pp_forward"
        )
    if is_recording(params, list(microbatches)):
        raise ValueError(
            f"{function}: params or microbatches require grad, so an outer derivative is being taken over a pipeline of "
            f"{axis.size} ranks, which sends values and not graphs; detach them, or take it on one rank"
        )
    if axis.size > 1:
        transport(function, axis)  # fails here, with the caller's name, for an axis nobody can talk over
    return table


def pp_forward_backward(
    stage_fn: Callable[[Any, Any, Any], Any],
    loss_fn: Callable[[Any, Any, Any], Loss],
    params: Any,
    microbatches: Sequence[Any],
    *,
    axis: Axis = Axis("pp"),  # noqa: B008 -- immutable
    schedule: ScheduleLike = "1f1b",
    trainable: Predicate | None = None,
) -> tuple[Loss, Any]:
    """Sum the loss over microbatches and return it with the gradients of that sum.

    ``loss_fn`` returns a `Ratio`, or ``(Ratio, metrics)`` with a dict of named Ratios; ``stage_fn`` may return ``(x, aux)``
    where ``aux`` is a dict of Ratios that are added to the loss, each with the batch's weight, whatever part of it the stage
    computes. The result is ``(Ratio, grads)``, or ``((Ratio, metrics), grads)`` if there are metrics or auxiliary losses.
    Ratios are summed over the microbatches; the gradients are those of the summed ``num``, undivided: `finalize_grads`
    divides. A leaf that ``trainable(path)`` refuses has gradient ``None``.

    On an axis of several ranks each rank runs its stages of the model, in the order that ``schedule`` says: a name
    ("gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"), a `Schedule`, or a function that makes
    one from the numbers of ranks and of microbatches. ``params`` are those of this rank's stage; if it has several,
    `Stages` of them. Stage 0 is called with ``x=None``, the others with what the one before returned (without its ``aux``):
    any tree of tensors, whose shapes may differ from microbatch to microbatch. Gradients have the structure of the rank's
    own params. A stage writes into nothing that it is given, and registers no tensor hooks where a schedule goes back in
    halves: they would run in each.

    Raises TypeError or ValueError, naming the fix, for a loss that is no Ratio of 0-d tensors, metrics that differ from
    microbatch to microbatch or clash with an auxiliary loss, no microbatches, an unknown schedule, params that are not
    those of the rank's stages, and an outer derivative over several ranks; MeshError if another rank fails.

    Inputs: ``microbatches`` replicated over ``axis``, params those of the rank. Outputs: the loss and metrics replicated;
    the gradients of each rank's own params, complete (of a `Copied` parameter: a partial sum).

    >>> import torch, fstep
    >>> stage = lambda params, x, mb: (mb if x is None else x) * params["w"]
    >>> loss = lambda params, x, mb: fstep.Ratio((x**2).sum(), torch.tensor(float(len(x))))
    >>> params = {"w": torch.tensor(3.0)}
    >>> fstep.pp_forward_backward(stage, loss, params, [torch.tensor([1.0, 2.0]), torch.tensor([1.0])])
    (Ratio(num=tensor(54.), den=tensor(3.)), {'w': tensor(36.)})
    >>> def two_stages(mesh):  # each multiplies by 3
    ...     return fstep.pp_forward_backward(stage, loss, params, [torch.tensor([1.0, 2.0])], axis=mesh.pp)
    >>> fstep.simulate(two_stages, pp=2)[0]
    (Ratio(num=tensor(405.), den=tensor(2.)), {'w': tensor(270.)})
    """
    check_callable("pp_forward_backward", "stage_fn", stage_fn)
    check_callable("pp_forward_backward", "loss_fn", loss_fn)
    table = _check("pp_forward_backward", params, microbatches, axis, schedule)
    total: Any = None
    given = Walk(params)

    if table is None and is_recording(given.leaves, list(microbatches)):
        grads: Any = None
        take = value_and_grad(lambda p, mb: _run(stage_fn, loss_fn, p, p, mb), has_aux=True, trainable=trainable)
        for microbatch in microbatches:
            pair, new = take(params, microbatch)
            total, grads = _add_pair(total, pair), _add(grads, new)
    else:
        refuse_inference_mode("pp_forward_backward")
        with torch.enable_grad():
            own = Own(given, trainable, none_is_fine=axis.size > 1)
            if table is None:
                for microbatch in microbatches:
                    pair = _run(stage_fn, loss_fn, own.tree, own.last, microbatch)
                    backward_into([pair[0].num], [torch.ones_like(pair[0].num)], own.leaves)
                    total = _add_pair(total, detach(pair))
            else:
                total = _run_table(table, stage_fn, loss_fn, own, microbatches, axis)
        grads = own.grads()

    loss, metrics = total
    return ((loss, metrics) if metrics else loss), grads


def _run_table(
    table: Schedule, stage_fn: Callable, loss_fn: Callable, params: Own, microbatches: Sequence[Any], axis: Axis
) -> tuple[Ratio, Metrics]:
    """Follow the table; gradients are added to the call's own leaves. Return the loss of all ranks."""
    parts = stage_parts("pp_forward_backward", params.tree, table, axis)
    of_loss = parts if params.last is params.tree else stage_parts("pp_forward_backward", params.last, table, axis)
    last = of_loss.get(table.stages - 1)
    device = device_of(params.tree, list(microbatches))
    leaves = {stage: [x for x in tensors_of(part) if x.requires_grad] for stage, part in parts.items()}
    if last is not None:
        known = set(map(id, leaves[table.stages - 1]))
        leaves[table.stages - 1] += [x for x in tensors_of(last) if x.requires_grad and id(x) not in known]
    run = Run(
        "pp_forward_backward",
        table,
        axis,
        device,
        lambda stage, x, m: _run_stage(stage_fn, parts[stage], x, microbatches[m]),
        lambda x, m: _run_loss(loss_fn, last, x, microbatches[m]),
        leaves,
    )
    run()
    for stage in parts:
        _same_names([aux[stage] for aux in run.aux])
    joined = [join_stages(aux) for aux in run.aux]
    # One kind of name for each kind of ratio, so that a metric cannot be mistaken for another stage's auxiliary loss.
    own = {f"aux {name}": ratio for name, ratio in add_up([ratios for ratios, _ in joined]).items()}
    stage_of = {f"aux {name}": stage for name, stage in joined[0][1].items()}
    if table.stages - 1 in parts:
        _same_names([metrics for _, metrics in run.results])
        own |= {f"metric {name}": ratio for name, ratio in add_up([metrics for _, metrics in run.results]).items()}
        own |= add_up([{"loss": loss} for loss, _ in run.results])
    summed = sum_ratios(own, stage_of, sum(map(len, leaves.values())), axis, device)

    metrics = {name.removeprefix("metric "): r for name, r in summed.items() if name.startswith("metric ")}
    aux = {name.removeprefix("aux "): r for name, r in summed.items() if name.startswith("aux ")}
    return _join(summed["loss"], metrics, aux)


def pp_forward(
    stage_fn: Callable[[Any, Any, Any], Any],
    fn: Callable[[Any, Any, Any], Any],
    params: Any,
    microbatches: Sequence[Any],
    *,
    axis: Axis = Axis("pp"),  # noqa: B008 -- immutable
    schedule: ScheduleLike = "1f1b",
) -> tuple[Any, ...]:
    """Run the model without gradients and return ``fn(params, x, microbatch)`` for every microbatch, in order.

    For evaluation (``fn`` is the loss, and the sum of the Ratios is the validation loss) and scoring (``fn`` returns log
    probabilities). Auxiliary losses of the stages are left out. Over several ranks it is the same pipeline as
    `pp_forward_backward`, forward only, and follows the same rules.

    Inputs: as for `pp_forward_backward`. Outputs: replicated over ``axis``; ``fn`` runs on the last stage's rank and its
    results are sent to all, so let it return what is small: a loss, log probabilities, not logits.

    >>> import torch, fstep
    >>> stage = lambda params, x, mb: mb * params["w"]
    >>> fstep.pp_forward(stage, lambda p, x, mb: x.sum(), {"w": torch.tensor(3.0)}, [torch.ones(2), torch.ones(1)])
    (tensor(6.), tensor(3.))
    """
    check_callable("pp_forward", "stage_fn", stage_fn)
    check_callable("pp_forward", "fn", fn)
    table = _check("pp_forward", params, microbatches, axis, schedule, forward=True)
    with torch.no_grad():
        if table is None:
            return tuple(fn(params, _split(stage_fn(params, None, mb))[0], mb) for mb in microbatches)
        parts = stage_parts("pp_forward", params, table, axis)
        last, device = table.stages - 1, device_of(params, list(microbatches))
        run = Run(
            "pp_forward",
            table,
            axis,
            device,
            lambda stage, x, m: _split(stage_fn(parts[stage], x, microbatches[m])),
            lambda x, m: fn(parts[last], x, microbatches[m]),
            None,
        )
        run()
        return broadcast_results(run.results if last in parts else None, table.rank_of[last], axis, device)
