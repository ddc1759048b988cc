"""torch's autograd engine, started from places in a graph that its public functions do not take everywhere.

`torch.autograd.backward` and `grad` take a `GradientEdge` in place of a tensor, but in torch 2.11 not one that points at a
`torch.autograd.Function`. The engine itself does. test_halves.py fails clearly should its name go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fstep.grad.remat import Rematerialised
from fstep.ops.factors import Products


def from_function(y: Tensor | GradientEdge) -> bool:
    """Say whether an edge points at a `torch.autograd.Function`."""
    return isinstance(y, GradientEdge) and isinstance(y.node, torch.autograd.function.BackwardCFunction)


def in_one_piece(node: Any) -> bool:
    """Say whether what a node stands for would be computed again, or not at all, if its backward pass came twice."""
    # torch.compile frees what it saved; remat computes its block again for every pass through it.
    return node.name() in ("CompiledFunctionBackward", f"{Rematerialised.__name__}Backward")


def is_products(node: Any) -> bool:
    """Say whether a node multiplies the factors of weights' gradients, as `split_weights` has it."""
    return bool(node.name() == f"{Products.__name__}Backward")


def run_engine(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    *,
    accumulate: bool,
    keep: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """Add the gradients of ``inputs`` to their ``.grad``, or return them and keep the graph, unless told not to."""
    found: tuple[Tensor | None, ...] = torch.autograd.graph._engine_run_backward(
        tuple(outputs),
        tuple(cotangents),
        not accumulate if keep is None else keep,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=accumulate,
    )
    return found
