"""Is somebody taking a derivative around this call?

Most of fstep computes on plain values and may then use kernels that have no derivative of their own. Where an outer
derivative is being recorded, the same function computes with ordinary operations instead, so that the result can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fstep.tree import tree_leaves

F = TypeVar("F", bound=Callable[..., Any])


def asked_while_tracing(question: F) -> F:
    """Let torch.compile call ``question`` once while it traces, and take the answer, instead of tracing it.

    This is what `torch.compiler.assume_constant_result` does, which cannot be used here: it imports the whole compiler, and
    importing fstep would take a second longer.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@asked_while_tracing  # traced, it would answer yes, whatever is the case
def in_transform() -> bool:
    """Say whether a torch.func transform (``vmap``, ``grad``, ``jvp``, ...) is running around this call.

    >>> import torch, fstep
    >>> fstep.in_transform(), torch.func.vmap(lambda x: x * fstep.in_transform())(torch.ones(2))
    (False, tensor([1., 1.]))
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_recording(*trees: Any) -> bool:
    """Say whether torch would record a graph through these values, or a torch.func transform is running.

    >>> import torch, fstep
    >>> fstep.is_recording({"w": torch.ones(2)}), fstep.is_recording({"w": torch.ones(2, requires_grad=True)})
    (False, True)
    """
    if in_transform():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(trees))
