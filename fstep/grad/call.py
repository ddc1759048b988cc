"""What a call of `pp_forward_backward` has on its way for a ZeRO node, so that it waits where a result is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fstep.grad.pieces import Gathering, Pieces, finish_sum, start_sum


class Call:
    """What one call of `pp_forward_backward` has under way for a node: a gather begun ahead, sums not waited for yet.

    It is no part of a tree's structure: a tree of the caller's is like one inside the call.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.leaves = leaves  # the call's own pieces
        self.gathering: Gathering | None = None
        self.sums: Gathering | None = None
        self.whole: list[Tensor | None] = [None for _ in leaves]
        self.done = list(self.whole)

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Call)

    def __hash__(self) -> int:
        return 0

    def take(self) -> Gathering | None:
        """Hand over the gather begun ahead, if there is one."""
        started, self.gathering = self.gathering, None
        return started

    def add(self, node: Pieces, like: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        """Take gradients of whole parameters: start their sum over the ranks or, if that is made once a step, keep them."""
        if node.sums != "step":
            self.finish(node, like)  # first, so that its memory is free
            self.sums = start_sum(node, like, grads)
            return
        for at, (x, grad) in enumerate(zip(like, grads, strict=True)):
            held = self.whole[at]
            if held is not None and grad is not None:
                held += grad
            elif x is not None and grad is not None:  # a copy: autograd may hand one tensor to two leaves
                self.whole[at] = grad.to(x.dtype, copy=True)

    def keep(self, node: Pieces, like: Sequence[Tensor | None], sums: Gathering) -> None:
        """Take a sum under way, to be waited for when the next one comes or at the end."""
        self.finish(node, like)
        self.sums = sums

    def start(self, node: Pieces, like: Sequence[Tensor | None]) -> None:
        """Begin the sum that is made once a step."""
        if node.sums == "step":
            self.sums, self.whole = start_sum(node, like, self.whole), []

    def finish(self, node: Pieces, like: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Wait for the sum under way, and return the gradients of the pieces so far."""
        if self.sums is not None:
            found = finish_sum(node, like, self.sums)
            self.done = [a if b is None else b if a is None else a.add_(b) for a, b in zip(self.done, found, strict=True)]
            self.sums = None
        return self.done
