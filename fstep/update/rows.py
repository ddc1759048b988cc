"""What every optimizer does around its formula: line the trees up, refuse a bad gradient, reuse memory when asked.

    params   {"w": W, "b": B}                row "b":  B, no gradient            frozen: kept as it is
    grads    {"w": G, "b": None}     ->      row "w":  W, G, (M, V)              formula or kernel -> W', (M', V')
    opt      {"w": M, "b": None} ...

An optimizer gives `update_rows` two forms of the same mathematics: a *kernel* that works in place on lists of tensors
(one launch for hundreds of leaves) and a *formula* for one leaf that changes nothing. Pure means clone, then kernel;
donated means kernel on the old tensors; the formula serves what the kernel cannot: outer derivatives, `vmap`, mixed
dtypes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fstep.grad.autodiff import Predicate, check_choice, split_trainable
from fstep.mesh.place import Place, places
from fstep.state.donate import bury
from fstep.state.state import TrainState
from fstep.trace import is_recording
from fstep.tree import check_type, tree_leaves, tree_paths, tree_replace_leaves, tree_rows

Decay = Callable[[str, Tensor], bool]
Kernel = Callable[[list[list[Tensor]], list[Tensor], float, Tensor], None]
Formula = Callable[[Tensor, Tensor, tuple[Tensor, ...], float], tuple[Tensor, ...]]


class Row(NamedTuple):
    """One leaf of the params with everything that belongs to it; ``slots`` is what the optimizer remembers of it.

    It is leaf ``number`` of the gradients. Paths are looked up by that number where one is wanted, for a predicate or in an
    error: to write hundreds of them at every step would take longer than the rest.
    """

    number: int
    param: Tensor
    grad: Tensor
    slots: tuple[Any, ...]


def whole_of(leaf: Tensor, place: Place) -> Tensor:
    """Return what a predicate is asked about: the leaf or, of a part, a tensor with the whole's shape and no memory."""
    return leaf if leaf.shape == place.shape else torch.empty(place.shape, dtype=leaf.dtype, device="meta")


def matrices(path: str, leaf: Tensor) -> bool:
    """Choose the leaves of two or more dimensions: the usual answer to "what is decayed?".

    Norm scales and biases have one dimension and are left out. For ``decay=``, which asks about every trained parameter: of
    one that is cut, it is shown a meta tensor of the whole shape.

    >>> import torch, fstep
    >>> fstep.matrices("layers.0.q", torch.ones(2, 2)), fstep.matrices("layers.0.norm", torch.ones(2))
    (True, False)
    >>> fstep.AdamW(weight_decay=0.1, decay=fstep.matrices).weight_decay
    0.1
    """
    return leaf.ndim >= 2


def require(ok: bool, message: str) -> None:
    """Raise `ValueError` with this message unless ok."""
    if not ok:
        raise ValueError(message)


def select(function: str, params: Any, trainable: Predicate | None) -> Any:
    """Return the params with ``None`` in place of every frozen leaf, or say which leaf cannot be trained.

    All may be frozen: a pipeline has such stages. Where there is but one, `value_and_grad` refuses to differentiate nothing.
    """
    check_choice(function, params, trainable)
    paths, leaves = tree_paths(params), tree_leaves(params)
    require(bool(leaves), f"{function}: params has no leaves; pass a tree with at least one tensor")
    for path, leaf in zip(paths, leaves, strict=True):
        if (trainable is None or trainable(path)) and not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"{function}: leaf {path!r} is {kind} and cannot be trained; "
                f"freeze it, e.g. trainable=lambda path: path != {path!r}"
            )
    return split_trainable(params, trainable, none_is_fine=trainable is not None)[0]


def check_lr(function: str, lr: float | Tensor) -> None:
    """Refuse a learning rate that is no number."""
    if isinstance(lr, Tensor):
        require(lr.ndim == 0, f"{function}: lr has shape {tuple(lr.shape)}; pass a float or a 0-d tensor")
    elif isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"{function}: lr is {lr!r}; pass a float or a 0-d tensor")
    else:
        require(0 <= lr < math.inf, f"{function}: lr is {lr}; pass a finite number >= 0")


def check_update(optimizer: str, state: TrainState, lr: float | Tensor, memory: type) -> None:
    """Refuse a learning rate that is no number, and a state that this optimizer did not begin."""
    check_lr(f"{optimizer}.update", lr)
    check_type(f"{optimizer}.update", "state", state, TrainState, "what init_state returns")
    if not isinstance(state.opt, memory):
        raise TypeError(
            f"{optimizer}.update: state.opt is {type(state.opt).__name__}; make it with {optimizer}.init(params)"
        )


def line_up(function: str, state: TrainState, grads: Any, *slots: Any) -> list[Row | None]:
    """Pair each leaf of the params with its gradient and its optimizer state; ``None`` stands for a frozen leaf."""
    try:
        found = tree_rows(state.params, grads, *slots)
    except ValueError as error:
        # The tree library names types and counts; whoever reads the error wants the leaf.
        raise ValueError(_difference(function, state.params, (grads, *slots))) from error
    rows: list[Row | None] = []
    number = 0
    for row in found:
        param, grad, memory = row[0], row[1], row[2:]
        remembers = len([slot for slot in memory if slot is not None])
        if isinstance(grad, Tensor) and not (grad.dtype == param.dtype or grad.is_floating_point()):
            kind = f"{grad.dtype} at {tree_paths(state.params)[len(rows)]!r}, where the parameter is {param.dtype}"
            raise TypeError(f"{function}: grads has {kind}; pass floating-point gradients, None for a frozen leaf")
        if isinstance(grad, Tensor) and grad.layout is not torch.strided:
            kind = f"a {grad.layout} tensor at {tree_paths(state.params)[len(rows)]!r}"
            raise TypeError(f"{function}: grads has {kind}; pass a dense one, grad.to_dense()")
        if remembers and isinstance(grad, Tensor) and grad.shape == param.shape:
            rows.append(Row(number, param, grad, memory))
            number += 1
        elif grad is None and not remembers:
            rows.append(None)
        else:
            raise ValueError(_misfit(function, tree_paths(state.params)[len(rows)], param, grad, memory))
    return rows


def _misfit(function: str, path: str, param: Tensor, grad: Any, memory: Sequence[Any]) -> str:
    """Say why a gradient does not belong to its parameter."""
    if grad is None:
        what = f"grads has no leaf {path!r} that opt state has"
    elif all(slot is None for slot in memory):
        what = f"grads has a leaf {path!r} that opt state has not (it was frozen at init)"
    elif not isinstance(grad, Tensor):
        return f"{function}: grads has a {type(grad).__name__} at {path!r}, where params has a tensor"
    else:
        return (
            f"{function}: the gradient of {path!r} has shape {tuple(grad.shape)}, "
            f"its parameter has shape {tuple(param.shape)}; differentiate with respect to these params"
        )
    return f"{function}: {what}; give init and value_and_grad the same trainable="


def _difference(function: str, params: Any, others: tuple[Any, ...]) -> str:
    known = tree_paths(params)
    for name, other in zip(("grads", *["opt state"] * len(others)), others, strict=False):
        found = tree_paths(other)
        for path in found:
            if path not in known:
                return f"{function}: {name} has a leaf {path!r} that params has not; pass trees of the same structure"
        for path in known:
            if path not in found:
                return (
                    f"{function}: {name} has no leaf {path!r} that params has; pass trees of the same structure "
                    "(None is the gradient of a frozen leaf)"
                )
    return f"{function}: params, grads and opt state are trees of different node types; pass trees of the same structure"


def trained(rows: Sequence[Row | None]) -> list[Row]:
    """Drop the frozen ones."""
    return [row for row in rows if row is not None]


def rows_recording(rows: Sequence[Row], *rest: Any) -> bool:
    """Say, as `is_recording` does, whether an outer derivative is being taken through the rows or ``rest``."""
    if is_recording(*rest):
        return True
    return torch.is_grad_enabled() and True in [x.requires_grad for row in rows for x in (row.param, row.grad, *row.slots)]


def decays(grads: Any, rows: Sequence[Row], weight_decay: float, decay: Decay | None) -> list[float]:
    """Return the weight decay of each row: ``weight_decay`` if the predicate chooses it, else 0."""
    if decay is None or not weight_decay:
        return [weight_decay] * len(rows)
    where = places(grads)
    chosen = [decay(where[row.number].path, whole_of(row.param, where[row.number])) for row in rows]
    return [weight_decay if choice else 0.0 for choice in chosen]


def update_rows(
    rows: Sequence[Row],
    bad: Tensor,
    formula: Formula,
    kernel: Kernel | None,
    *,
    weight_decays: Sequence[float],
    donate: bool,
    recording: bool,
) -> list[tuple[Tensor, ...]]:
    """Return the new ``(param, *slots)`` of each row; where ``bad`` is true, the old ones, bit for bit.

    With ``donate`` these are the old tensors, with new values in them.
    """
    out: list[tuple[Tensor, ...]] = [()] * len(rows)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (row, decayed) in enumerate(zip(rows, weight_decays, strict=True)):
        alike = _alike((row.param, row.grad, *row.slots))
        if kernel is None or recording or not (_fits_kernel(row.param) and (alike or _alike((row.param, *row.slots)))):
            out[i] = _by_formula(row, bad, formula, decayed, donate, recording)
        else:
            # A gradient of another dtype or layout is converted on its own, so that one such copy is alive at a time.
            groups.setdefault((row.param.device, row.param.dtype, decayed, -1 if alike else i), []).append(i)
    for (device, _, decayed, alone), members in groups.items():
        assert kernel is not None
        for i in members:
            old = (rows[i].param, *rows[i].slots)
            out[i] = old if donate else tuple(x.clone() for x in old)
        grads = [rows[i].grad for i in members]
        if alone >= 0:
            grads = [torch.empty_like(rows[i].param).copy_(rows[i].grad) for i in members]
        columns = [list(column) for column in zip(*(out[i] for i in members), strict=True)]
        kernel(columns, grads, decayed, bad.to(device, torch.float32))
        if donate:
            # These kernels leave autograd's version counters alone; a graph that still holds an old tensor must notice.
            torch.autograd.graph.increment_version([x for column in columns for x in column])
    return out


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Say whether the elements of these tensors, in order of memory, are the same ones and of one type."""
    dtype, device, stride = tensors[0].dtype, tensors[0].device, tensors[0].stride()
    for x in tensors[1:]:  # noqa: SIM110 -- `all` of a generator takes twice as long, and this is done for every leaf
        if x.dtype != dtype or x.stride() != stride or x.device != device:
            return False
    return True


def _fits_kernel(x: Tensor) -> bool:
    """Say whether the fused kernels are right for a parameter, if what belongs to it is alike.

    They walk through memory: with other strides than the parameter's they silently pair the wrong elements.
    """
    # On the CPU fused SGD is wrong by a tenth of its step in 16 bits (torch 2.13), from 16 elements on.
    exact = x.is_cuda or (x.is_cpu and x.dtype in (torch.float32, torch.float64))
    return exact and (x.is_contiguous() or (x.ndim == 2 and x.mT.is_contiguous()))


def _by_formula(
    row: Row, bad: Tensor, formula: Formula, weight_decay: float, donate: bool, recording: bool
) -> tuple[Tensor, ...]:
    old = (row.param, *row.slots)
    bad = bad.to(row.param.device)
    wide = torch.promote_types(row.param.dtype, torch.float32)
    grad = row.grad.to(wide)
    if recording:
        # The branch that `where` drops still has a derivative, and NaN times 0 is NaN: keep it finite.
        grad = torch.where(bad, 0.0, grad)
    new = formula(row.param.to(wide), grad, tuple(x.to(wide) for x in row.slots), weight_decay)
    pairs = [(o, n.to(o.dtype)) for o, n in zip(old, new, strict=True)]
    if donate:
        return tuple(torch.where(bad, o, n, out=o) for o, n in pairs)
    return tuple(torch.where(bad, o, n) for o, n in pairs)


def next_state(
    state: TrainState, rows: Sequence[Row | None], new: Sequence[Tensor], opt: Any, bad: Tensor, donate: bool
) -> TrainState:
    """Put the new params (one for each trained row) and optimizer state into the state that follows ``state``."""
    params = state.params
    if not donate:  # else they are the same tensors
        updated = iter(new)
        leaves = [p if row is None else next(updated) for p, row in zip(tree_leaves(params), rows, strict=True)]
        params = tree_replace_leaves(params, leaves)
    result = dataclasses.replace(state, params=params, opt=opt, step=state.step + 1, skipped=state.skipped + bad)
    if donate:
        bury(state)
    return result
