"""Running a `Schedule`: one rank goes through its row of the table, action by action.

    F s.m    take x, received or from the stage before on this rank; run the stage; send what comes out
    B s.m    take the gradient of what came out; go back through the stage; send the gradient of x
    I s.m    the half of B that others wait for            W s.m    the other half

Between actions a rank starts to receive what has been sent by then, and lets go of what others have (`traffic`).

Everything that has to be remembered from a forward to its backward pass is a local value of one call: after the last action
there is nothing left, so a call never meets what an earlier one has left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fstep.grad.autodiff import detach
from fstep.grad.engine import from_function
from fstep.grad.halves import WeightHalf, backward_halves, backward_whole
from fstep.grad.messages import BACKWARD, Coming, recv_tensors, recv_tree, send_tensors, send_tree, tensors_of, with_tensors
from fstep.grad.schedule import Action, Schedule
from fstep.grad.traffic import links, traffic
from fstep.mesh.axis import Axis
from fstep.mesh.exchange import transport
from fstep.mesh.transport import MeshError, Pending
from fstep.ratio import Ratio
from fstep.tree import tree_map

Metrics = dict[str, Ratio]
RunStage = Callable[[int, Any, int], tuple[Any, Metrics]]
RunLoss = Callable[[Any, int], tuple[Ratio, Metrics]]


@dataclass
class _Live:
    """A microbatch between its forward and its backward pass: where the graph begins and ends."""

    inputs: list[Tensor]  # what was received and wants a gradient
    outputs: list[GradientEdge]
    likes: list[tuple[tuple[int, ...], torch.dtype]]  # of the outputs' gradients
    cotangents: list[Tensor] | None  # None: they come from the next stage
    sides: list[tuple[GradientEdge, Tensor]]  # auxiliary losses: gradient 1


class Run:
    """One rank's run through a schedule. ``leaves`` are what gradients are added to; None: forward only."""

    def __init__(
        self,
        function: str,
        schedule: Schedule,
        axis: Axis,
        device: torch.device,
        run_stage: RunStage,
        run_loss: Callable[[Any, int], Any],
        leaves: Mapping[int, Sequence[Tensor]] | None,
    ) -> None:
        self.function, self.schedule, self.axis, self.device = function, schedule, axis, device
        self.run_stage, self.run_loss, self.leaves = run_stage, run_loss, leaves
        self.last = schedule.stages - 1
        self.live: dict[tuple[int, int], _Live] = {}
        self.halves: dict[tuple[int, int], WeightHalf] = {}
        self.handed: dict[Action, Any] = {}  # from a stage to its neighbour on the same rank
        self.x_coming: dict[Action, Coming] = {}
        self.grads_coming: dict[Action, list[Pending[Tensor]]] = {}
        self.sent: dict[Action, list[Pending[Any]]] = {}
        self.results: list[Any] = [None] * schedule.microbatches
        self.aux: list[dict[int, Metrics]] = [{} for _ in range(schedule.microbatches)]

    def __call__(self) -> None:
        """Go through this rank's row."""
        act = {"F": self.forward, "B": self.backward, "I": self.input_half, "W": self.weight_half}
        row = zip(self.schedule.actions[self.axis.rank], traffic(self.schedule)[self.axis.rank], strict=True)
        at: Action | str = "the start"
        try:
            if self.axis.size > 1:
                transport(self.function, self.axis).connect(links(self.schedule))
            for at, change in row:
                for a in change.release:
                    self._let_go(a)
                for a in change.receive:
                    self._start_to_receive(a)
                act[at.kind](at.stage, at.microbatch)
            at = "the end"
            for a in list(self.sent):
                self._let_go(a)
        except MeshError as error:
            raise MeshError(f"{self.function}: at {at} of {self.schedule.name}: {error}") from error

    def _let_go(self, a: Action) -> None:
        """Wait until others have what an action of this rank has sent."""
        for pending in self.sent.pop(a):
            pending.wait()

    def _start_to_receive(self, a: Action) -> None:
        """Start to receive what an action of this rank needs from another."""
        if a.kind == "F":
            what, src = self._what(a.stage - 1, a.microbatch), self.schedule.rank_of[a.stage - 1]
            self.x_coming[a] = recv_tree(what, src, self.axis, self.device)
        else:
            likes, src = self.live[a.stage, a.microbatch].likes, self.schedule.rank_of[a.stage + 1]
            self.grads_coming[a] = recv_tensors(likes, src, self.axis, BACKWARD, self.device)

    def _elsewhere(self, stage: int) -> int | None:
        """Return the rank of a stage, unless it is this one."""
        rank = self.schedule.rank_of[stage]
        return None if rank == self.axis.rank else rank

    def _what(self, stage: int, m: int) -> str:
        """Name a message, so that ranks which follow different tables find out."""
        return f"microbatch {m} of {self.schedule.microbatches} from stage {stage} of {self.schedule.stages}"

    def _input(self, stage: int, m: int) -> tuple[Any, list[bool]]:
        """Return a stage's input, and for each of its tensors whether its gradient is wanted."""
        if self._elsewhere(stage - 1) is not None:
            return self.x_coming.pop(Action("F", stage, m)).wait()
        x = self.handed.pop(Action("F", stage - 1, m))
        return detach(x), [t.requires_grad for t in tensors_of(x)]

    def forward(self, stage: int, m: int) -> None:
        """Run a stage on a microbatch."""
        x, wanted = (None, []) if stage == 0 else self._input(stage, m)
        inputs: list[Tensor] = []
        if self.leaves is not None and any(wanted):
            received = [t.requires_grad_() if w else t for t, w in zip(tensors_of(x), wanted, strict=True)]
            x, inputs = with_tensors(x, received), [t for t in received if t.requires_grad]
        y, aux = self.run_stage(stage, x, m)
        self.aux[m][stage] = detach(aux)
        sides = [r.num for r in aux.values() if r.num.requires_grad]
        if stage == self.last:
            result = self.run_loss(y, m)
            self.results[m] = detach(result)
            outs = [] if self.leaves is None else [result[0].num]
        else:
            outs = self._pass_on(stage, y, m)
        if self.leaves is None:
            return
        kept = [o for o in outs if o.requires_grad]
        self.live[stage, m] = _Live(
            inputs,
            [_edge(o) for o in kept],
            [(tuple(o.shape), o.dtype) for o in kept],
            [torch.ones_like(o) for o in kept] if stage == self.last else None,
            [(_edge(s), torch.ones_like(s)) for s in sides],
        )

    def _pass_on(self, stage: int, y: Any, m: int) -> list[Tensor]:
        if self.leaves is None:
            y = detach(y)
        dst = self._elsewhere(stage + 1)
        if dst is None:
            # A tensor of its own, whose graph is not ours: only whether it wants a gradient goes along.
            self.handed[Action("F", stage, m)] = y
        else:
            self.sent[Action("F", stage, m)] = send_tree(y, self._what(stage, m), dst, self.axis)
        return tensors_of(y)

    def _cotangents(self, a: Action, live: _Live) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return what to differentiate, and the gradients that have come for it."""
        given = live.cotangents
        if given is None:
            if self._elsewhere(a.stage + 1) is None:
                given = self.handed.pop(Action("B", a.stage + 1, a.microbatch))
            else:
                given = [pending.wait() for pending in self.grads_coming.pop(a)]
        return [*live.outputs, *(e for e, _ in live.sides)], [*given, *(one for _, one in live.sides)]

    def _send_back(self, a: Action, live: _Live, grads: Sequence[Tensor | None]) -> None:
        if a.stage == 0:
            return
        # Zeros where nothing depended on an input: who waits for a message cannot know that none will come.
        full = [
            torch.zeros_like(x, requires_grad=False) if g is None else g for x, g in zip(live.inputs, grads, strict=True)
        ]
        dst = self._elsewhere(a.stage - 1)
        if dst is None:
            self.handed[Action("B", a.stage, a.microbatch)] = full
        else:
            self.sent[a] = send_tensors(full, dst, self.axis, BACKWARD)

    def backward(self, stage: int, m: int) -> None:
        """Go back through a stage, both halves at once."""
        assert self.leaves is not None
        a, live = Action("B", stage, m), self.live.pop((stage, m))
        outputs, cotangents = self._cotangents(a, live)
        backward_whole(outputs, cotangents, [*self.leaves[stage], *live.inputs])
        self._send_back(a, live, [x.grad for x in live.inputs])

    def input_half(self, stage: int, m: int) -> None:
        """Go back through a stage for its input's gradient."""
        assert self.leaves is not None
        a, live = Action("I", stage, m), self.live.pop((stage, m))
        outputs, cotangents = self._cotangents(a, live)
        grads, self.halves[stage, m] = backward_halves(outputs, cotangents, live.inputs, self.leaves[stage])
        self._send_back(a, live, grads)

    def weight_half(self, stage: int, m: int) -> None:
        """Add the weights' gradients of a stage."""
        self.halves.pop((stage, m))()


def _edge(y: Tensor) -> GradientEdge:
    """Return where ``y`` is in the graph, which keeps the graph and not ``y``: an output may go once it has been sent."""
    edge = get_gradient_edge(y)
    # The node of a function written in Python does not own itself; a view's node does, and what is below it.
    return get_gradient_edge(y.view_as(y)) if from_function(edge) else edge


def add_up(metrics: Sequence[Metrics]) -> Metrics:
    """Add ratios by name, in order."""
    total: Metrics = {}
    for more in metrics:
        for name, ratio in more.items():
            total[name] = tree_map(torch.add, total[name], ratio) if name in total else ratio
    return total


def join_stages(aux: Mapping[int, Metrics]) -> tuple[Metrics, dict[str, int]]:
    """Join what the stages of a rank report about one microbatch: sums add up, the weight is that of the first stage.

    Also return which stage that is, for each name.
    """
    total: Metrics = {}
    first: dict[str, int] = {}
    for stage in sorted(aux):
        for name, ratio in aux[stage].items():
            if name in total:
                total[name] = Ratio(total[name].num + ratio.num, total[name].den)
            else:
                total[name], first[name] = ratio, stage
    return total, first
