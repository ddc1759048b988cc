"""A backward pass in two halves: the input's gradient now, since another stage waits for it, the weights' later.

    x ──► [op] ──► [op] ──► y        input half: back along this line, noting what arrives at every op that has a weight
            ▲        ▲
            w1       w2              weight half: from what was noted, down each side branch

Each half costs about one forward. Two whole passes would cost three, since the second would walk along the line again.

Through what is compiled or rematerialised backward goes only once. There the weights' gradients that `split_weights` leaves
as two factors are what can wait: the first half returns the factors, and the graph can go; the second multiplies them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fstep.grad.autodiff import backward_into
from fstep.grad.engine import from_function, in_one_piece, is_products, run_engine
from fstep.ops.factors import flat

Node = Any
WeightHalf = Callable[[], None]


def backward_halves(
    outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[list[Tensor | None], WeightHalf]:
    """Return the gradients of ``inputs``, and a function that adds those of ``leaves`` to their ``.grad``.

    ``inputs`` and ``leaves`` are leaves of the graph. What cannot be put off is computed at once and added later: the
    gradients of a function of the user's own, which come in one piece, and of a weight used by several operations. Where
    `split_weights` left products, or a part of the graph is compiled or rematerialised, all else is computed at once.
    """
    order, line = _line(outputs, inputs)
    if any(in_one_piece(node) or is_products(node) for node in order):
        # What reaches an input is on its way, products of weights that are gathered behind it (ZeRO-3) included.
        products = [node for node in order if is_products(node) and node not in line]
        return _halves_by_factors(products, outputs, cotangents, inputs, leaves)
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

    # Who asks the engine for an edge gets what comes along every way to it. Where a weight is reached both directly and
    # through something made of it, the second share would be sent on again: such a graph is gone through at once.
    behind = _reach([c for edges in branches.values() for e in edges for c, _ in e.node.next_functions if c is not None])
    together = [list(at_once.values()), *(edges for edges in later.values() if len(edges) > 1)]
    if any(e.node in behind for edges in together for e in edges):
        return _halves_by_factors([], outputs, cotangents, inputs, leaves)

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


def _halves_by_factors(
    products: Sequence[Node],
    outputs: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
) -> tuple[list[Tensor | None], WeightHalf]:
    """Go through the whole graph now, but keep the factors of products for later."""
    wanted = {id(x) for x in leaves}
    waiting, number = list(products), -1
    while len(waiting) != number:
        # The engine goes to whatever is asked for: to the leaves that can be reached without products that wait. A product
        # from which one of them can be reached, or another product, cannot wait, and then neither can what it leads to.
        stop, number = set(waiting), len(waiting)
        reached = _reach([o.node for o in outputs], stop=stop)
        now = [node for node in reached if id(_leaf(node)) in wanted]
        waiting = [node for node in waiting if not _reach([node]) & (set(now) | (stop - {node}))]
    factors = [e for node in waiting for e in _stand_ins(node)]
    asked = [*map(get_gradient_edge, inputs), *factors, *(GradientEdge(node, 0) for node in now)]
    found = list(run_engine(outputs, cotangents, asked, accumulate=False, keep=False))
    grads, arrived, rest = found[: len(inputs)], found[len(inputs) : len(asked) - len(now)], found[len(asked) - len(now) :]
    # Not by hand: one tensor may be the gradient of two leaves, or of a leaf and an input, or be an expanded one.
    direct = [(GradientEdge(node, 0), g) for node, g in zip(now, rest, strict=True) if g is not None]
    backward_into([e for e, _ in direct], [g for _, g in direct], leaves)
    roots = list(outputs)  # they own the nodes of products; what else the graph had saved is gone

    def weight_half() -> None:
        shared: list[tuple[GradientEdge, Tensor]] = []
        while waiting:
            edges = _stand_ins(waiting.pop())
            own = [arrived.pop() for _ in edges][::-1]
            left = _add_products(edges[0].node, own, wanted)
            own.clear()
            given = [(e, g) for e, g in zip(edges, left, strict=True) if g is not None]
            if all(_leaf(child) is not None for child, _ in edges[0].node.next_functions):
                backward_into([e for e, _ in given], [g for _, g in given], leaves)
            else:  # weights made of others: what made them may be the same for several, and can be gone through once
                shared += given
        backward_into([e for e, _ in shared], [g for _, g in shared], leaves)
        shared.clear()
        roots.clear()

    return grads, weight_half


def backward_whole(outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Add the gradients of ``leaves`` to their ``.grad`` like `backward_into`, products straight into what is there."""
    wanted = {id(x) for x in leaves}

    def into(node: Node) -> Callable[[Any], Any]:
        return lambda factors: tuple(_add_products(node, factors, wanted))

    hooks = [n.register_prehook(into(n)) for n in _reach([o.node for o in outputs]) if is_products(n)]
    try:
        backward_into(outputs, cotangents, leaves)
    finally:
        for hook in hooks:
            hook.remove()


def _add_products(node: Node, factors: Sequence[Tensor | None], wanted: set[int]) -> list[Tensor | None]:
    """Add ``g.T @ h`` to the gradients of leaves, where it needs not be written down before, and return what is left to do.

    Of 16-bit numbers the sum is then rounded once and not twice. Wider ones are left to be added afterwards, which gives the
    bits of a backward pass in one piece.
    """
    left = list(factors)
    for at, (child, _) in enumerate(node.next_functions):
        leaf, g, h = _leaf(child), left[2 * at], left[2 * at + 1]
        if id(leaf) not in wanted or leaf.grad is None or g is None or h is None:
            continue
        if leaf.grad.itemsize == 2 and leaf.grad.dtype == g.dtype == h.dtype:
            leaf.grad.addmm_(flat(g).t(), flat(h))
            left[2 * at] = left[2 * at + 1] = None
    return left


def _leaf(node: Node) -> Any:
    """Return the leaf whose gradient a node adds up, if it does."""
    return getattr(node, "variable", None)


def _stand_ins(node: Node) -> list[GradientEdge]:
    return [GradientEdge(node, i) for i in range(2 * len(node.next_functions))]


def _reach(start: Sequence[Node], stop: Collection[Node] = ()) -> set[Node]:
    """Return the nodes that can be reached, not going beyond those to ``stop`` at."""
    seen: set[Node] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions if child is not None and node not in stop)
    return seen


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
