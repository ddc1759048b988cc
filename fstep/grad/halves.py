"""A backward pass in two halves: the input's gradient now, since another stage waits for it, the weights' later.

    x ──► [op] ──► [op] ──► y        input half: back along this line, noting what arrives at every op that has a weight
            ▲        ▲
            w1       w2              weight half: from what was noted, down each side branch

Each half costs about one forward. Two whole passes would cost three, since the second would walk along the line again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fstep.grad.autodiff import backward_into
from fstep.grad.engine import from_function, in_one_piece, run_engine

Node = Any
WeightHalf = Callable[[], None]


def backward_halves(
    outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[list[Tensor | None], WeightHalf]:
    """Return the gradients of ``inputs``, and a function that adds those of ``leaves`` to their ``.grad``.

    ``inputs`` and ``leaves`` are leaves of the graph. What cannot be put off is computed at once and added later: the
    gradients of a function of the user's own, which come in one piece, and of a weight used by several operations. Where
    a part of the graph is compiled or rematerialised, all of it is computed at once, and nothing is left for later.
    """
    order, line = _line(outputs, inputs)
    if any(in_one_piece(node) for node in order):
        backward_into(outputs, cotangents, [*leaves, *inputs])
        return [x.grad for x in inputs], lambda: None
    branches = {node: [e for e in _edges(node) if e.node not in line] for node in order if node in line}
    users: dict[tuple[Node, int], int] = {}
    for edges in branches.values():
        for e in edges:
            users[e.node, e.output_nr] = users.get((e.node, e.output_nr), 0) + 1
    later: dict[Node, list[GradientEdge]] = {}
    at_once: dict[tuple[Node, int], GradientEdge] = {}
    for node, edges in branches.items():
        for e in edges:
            if users[e.node, e.output_nr] > 1 or from_function(GradientEdge(node, 0)):
                at_once[e.node, e.output_nr] = e
            else:
                later.setdefault(node, []).append(e)

    arrived: dict[Node, tuple[Tensor | None, ...]] = {}
    hooks = [node.register_prehook(_note(arrived, node)) for node in later]
    through = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.node in line]
    beside = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.node not in line]
    grads: list[Tensor | None] = [None] * (len(inputs) + len(at_once))
    try:
        if through:
            wanted = [*map(get_gradient_edge, inputs), *at_once.values()]
            grads = list(_grad(through, wanted))
    finally:
        for hook in hooks:
            hook.remove()
    known = [(e, g) for e, g in zip(at_once.values(), grads[len(inputs) :], strict=True) if g is not None]

    roots = list(outputs)  # they own the graph: of a Python function's node its edge is not an owner

    def weight_half() -> None:
        sides = [*beside, *known]
        for node, edges in later.items():
            given = [(GradientEdge(node, i), g) for i, g in enumerate(arrived.get(node, ())) if g is not None]
            if given:
                sides += [(e, g) for e, g in zip(edges, _grad(given, edges), strict=True) if g is not None]
        backward_into([e for e, _ in sides], [g for _, g in sides], leaves)
        # Nothing may keep the graph alive: the caller may hold this function for longer.
        for held in (sides, known, beside, roots):
            held.clear()
        later.clear()
        arrived.clear()

    return grads[: len(inputs)], weight_half


def _grad(outputs: Sequence[tuple[GradientEdge, Tensor]], inputs: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    return run_engine([o for o, _ in outputs], [c for _, c in outputs], inputs, accumulate=False)


def _note(arrived: dict[Node, tuple[Tensor | None, ...]], node: Node) -> Callable[[Any], None]:
    def hook(grads: tuple[Tensor | None, ...]) -> None:
        arrived[node] = grads

    return hook


def _edges(node: Node) -> list[GradientEdge]:
    return [GradientEdge(child, number) for child, number in node.next_functions if child is not None]


def _line(outputs: Sequence[GradientEdge], inputs: Sequence[Tensor]) -> tuple[list[Node], set[Node]]:
    """Return the graph's nodes, inputs last, and those of them from which an input can be reached."""
    ends = {get_gradient_edge(x).node for x in inputs}
    order: list[Node] = []
    line: set[Node] = set()
    seen: set[Node] = set()
    stack = [(o.node, False) for o in outputs]
    while stack:  # depth first, without recursion: graphs are deeper than Python's stack
        node, done = stack.pop()
        if done:
            order.append(node)
            if node in ends or any(child in line for child, _ in node.next_functions if child is not None):
                line.add(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return order[::-1], line
