"""A model's layers one after another, with those that are cut (ZeRO-3) gathered for as long as they are used.

    forward     gather 0 | layer 0    | layer 1    | layer 2             gather i + 1 while layer i computes; then free i
                         | gather 1   | gather 2   |
    backward             | layer 2    | layer 1    | layer 0             gather again, one layer ahead
                         | gather 1   | gather 0   |
                                      | sum 2      | sum 1 | sum 0       gradients of layer i while layer i - 1 computes

What a layer saves for its backward pass and lives in gathered memory is saved as a note of where it is in there, so that the
memory can go. The two moves of a layer are two nodes of the graph, and the graph turns their order round by itself::

    forward    begin 0, enter 0, begin 1, layer 0, enter 1, begin 2, layer 1, enter 2, layer 2, enter 3
    backward   enter 3, layer 2, enter 2, layer 1, begin 2, enter 1, layer 0, begin 1, enter 0, begin 0

``begin i`` starts the gather, and its transpose waits for the sum; ``enter i`` waits for the gather, and its transpose
starts the sum, and the gathers for what comes next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import Function

from fstep.grad.messages import tensors_of
from fstep.grad.pieces import Gathering, Pieces, as_it_is, finish_sum, is_pieces, start_gather, start_sum, wholes
from fstep.grad.shard import gather_ahead, gather_params
from fstep.trace import in_transform
from fstep.tree import NAMESPACE, check_callable, check_type, tree_leaves, tree_replace_leaves


def fold_layers(f: Callable[[int, Any, Any], Any], layers: Mapping[int, Any], x: Any, *, ahead: Any = None) -> Any:
    """Compute ``for i in sorted(layers): x = f(i, layers[i], x)``, with layers that `shard_params` cut whole inside f.

    While a layer computes the next one is gathered; afterwards its memory is free. In the backward pass layers are gathered
    again, and gradients are summed over the ranks while the layer before computes: two layers are whole at any time, and the
    last one from its forward to its backward. ``x`` is a tree with tensors. `remat` of f, frozen layers and frozen leaves,
    `torch.no_grad` and torch.compile of f work as without.

    ``ahead`` is what comes behind the layers, a head say: inside `pp_forward_backward` its gather begins while the last
    layer computes, for `gather_params` to wait for.

    All ranks of the axis have to come by, also one that has nothing to compute. Gradients of gradients go through
    `gather_params`, not through here. Inputs: layers that are *shards* over the axis of their nodes; gradients of them come
    complete. ``x`` is each rank's own.

    >>> import torch, fstep
    >>> layers = {i: {"w": torch.full((2, 2), 0.5)} for i in range(3)}
    >>> def f(mesh):
    ...     zero = fstep.shard_params({"layers": layers}, mesh.dp)["layers"]
    ...     return fstep.fold_layers(lambda i, layer, x: x @ layer["w"] + i, zero, torch.ones(2))
    >>> fstep.simulate(f, dp=2)[0], fstep.fold_layers(lambda i, layer, x: x @ layer["w"] + i, layers, torch.ones(2))
    (tensor([4., 4.]), tensor([4., 4.]))
    """
    check_callable("fold_layers", "f", f)
    if isinstance(layers, Pieces):
        raise TypeError(
            "fold_layers: layers are one unit of shard_params, which is gathered at once; make each layer a unit, as by "
            "default, or pass gather_params(layers)"
        )
    check_type("fold_layers", "layers", layers, Mapping, "a dict of layers by their number")
    order = sorted(layers)
    tree: Any = dict(layers)
    cut = any(map(is_pieces, optree.tree_leaves(tree, is_leaf=is_pieces, namespace=NAMESPACE)))
    if in_transform() or not cut:
        for i in order:
            x = f(i, gather_params(layers[i]) if cut else layers[i], x)
        return x
    passes = [_Layer(layers[i]) for i in order]
    passes[0].first = True
    token = passes[0].begin()
    for at, i in enumerate(order):
        x, whole = _enter(passes, at, token, x)
        token = passes[at + 1].begin() if at + 1 < len(order) else None
        if at + 1 == len(order):
            gather_ahead(ahead)
        with passes[at].notes():
            x = f(i, whole, x)
        passes[at].recorded = any(t.requires_grad for t in tensors_of(x))
        if at + 1 < len(order) or not passes[at].recorded:
            passes[at].let_go()  # the backward pass begins with the last layer
    return _enter(passes, len(order), None, x)[0]


@dataclass(frozen=True)
class _Note:
    """Says where in a layer's gathered memory a saved tensor is."""

    node: int
    group: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Layer:
    """One layer in one call: its pieces, its gathered memory while there is some, the sum under way of its gradients."""

    def __init__(self, tree: Any) -> None:
        inside, self.spec = optree.tree_flatten(tree, is_pieces, none_is_leaf=True, namespace=NAMESPACE)
        self.rest = [None if is_pieces(x) else x for x in inside]
        self.nodes: list[Pieces] = [as_it_is(x) for x in inside if is_pieces(x)]
        self.at = [k for k, x in enumerate(inside) if is_pieces(x)]
        self.leaves = [[None if x is None else x.detach() for x in node.leaves()] for node in self.nodes]
        grad = torch.is_grad_enabled()
        # The pieces whose gradients are wanted; the same on every rank, since it depends on their names only.
        self.like = [
            [y if x is not None and x.requires_grad and grad else None for x, y in zip(node.leaves(), own, strict=True)]
            for node, own in zip(self.nodes, self.leaves, strict=True)
        ]
        self.recorded = False
        self.first = False
        self.started: list[Gathering] | None = None
        self.buffers: list[list[Tensor | None]] | None = None
        self.sums: list[Gathering] | None = None

    def begin(self) -> Tensor | None:
        """Start the gather; return what ties it to `_enter` in the graph."""
        wanted = [x for node in self.nodes for x in node.leaves() if x is not None]
        if not wanted:
            return None
        token: Tensor = _Begin.apply(self, *wanted)  # type: ignore[no-untyped-call]
        return token

    def start(self) -> None:
        """Start the gather, unless it has been."""
        if self.started is None and self.buffers is None:
            self.started = [start_gather(n, own, n.dtype) for n, own in zip(self.nodes, self.leaves, strict=True)]

    def wait(self) -> list[list[Tensor | None]]:
        """Return the gathered memory."""
        self.start()
        if self.buffers is None:
            assert self.started is not None
            self.buffers = [[None if p is None else p.wait() for p in gathering] for gathering in self.started]
            self.started = None
        return self.buffers

    def let_go(self) -> None:
        """Free the gathered memory."""
        self.started = self.buffers = None

    def whole(self, found: Sequence[Tensor | None]) -> Any:
        """Put whole parameters, those of all nodes in a row, into the layer's tree."""
        inside, rest = list(self.rest), iter(found)
        for k, node in zip(self.at, self.nodes, strict=True):
            inside[k] = node.fill([next(rest) for _ in node.slots])
        return optree.tree_unflatten(self.spec, inside)

    def notes(self) -> contextlib.AbstractContextManager[Any]:
        """Save notes, while this lasts, in place of tensors that are in the gathered memory."""
        if not torch.is_grad_enabled():
            return contextlib.nullcontext()
        memory = {
            b.untyped_storage().data_ptr(): (k, g, b.dtype)
            for k, buffers in enumerate(self.wait())
            for g, b in enumerate(buffers)
            if b is not None and b.numel()
        }

        def pack(t: Tensor) -> Any:
            k, g, dtype = memory.get(t.untyped_storage().data_ptr() if t.layout == torch.strided else 0, (0, 0, None))
            # Detached: an output saved as itself is a cycle, and its graph would not end with the step.
            return _Note(k, g, tuple(t.shape), t.stride(), int(t.storage_offset())) if t.dtype == dtype else t.detach()

        return torch.autograd.graph.saved_tensors_hooks(pack, self.read)

    def read(self, saved: Any) -> Any:
        """Find what a note says."""
        if not isinstance(saved, _Note):
            return saved
        memory = self.wait()[saved.node][saved.group]
        assert memory is not None
        return memory.as_strided(saved.shape, saved.stride, saved.offset)

    def start_sum(self, grads: Sequence[Tensor | None]) -> None:
        """Start to sum gradients of the whole parameters, those of all nodes in a row."""
        rest = iter(grads)
        self.sums = []
        for node, like in zip(self.nodes, self.like, strict=True):
            part = [next(rest) for _ in node.slots]
            if node.call is not None and node.sums == "step":
                node.call.add(node, like, part)
                self.sums.append([None for _ in node.parts])
            else:
                self.sums.append(start_sum(node, like, part))

    def finish_sum(self) -> list[Tensor | None]:
        """Return the gradients of the pieces."""
        assert self.sums is not None
        if self.first:  # what is in front of the layers need not wait for it
            for k, node in enumerate(self.nodes):
                if node.call is not None and node.sums != "step":
                    node.call.keep(node, self.like[k], self.sums[k])
                    self.sums[k] = [None for _ in node.parts]
        done = [finish_sum(*each) for each in zip(self.nodes, self.like, self.sums, strict=True)]
        self.sums = None
        leaves = [x for own in self.leaves for x in own]
        return [g for g, x in zip((g for gs in done for g in gs), leaves, strict=True) if x is not None]


class _Begin(Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, *pieces: Tensor) -> Tensor:
        ctx.layer = layer
        layer.start()
        return torch.empty(0, device=pieces[0].device)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        return None, *ctx.layer.finish_sum()


def _enter(passes: list[_Layer], at: int, token: Tensor | None, x: Any) -> tuple[Any, Any]:
    """Return ``x`` and the whole layer ``at``; behind the last one, ``x`` only."""
    leaves = tree_leaves(x)
    through = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
    if at == len(passes) and not through:
        return x, None
    out = _Enter.apply(passes, at, token, *(leaves[k] for k in through))  # type: ignore[no-untyped-call]
    for k, t in zip(through, out, strict=False):
        leaves[k] = t
    return tree_replace_leaves(x, leaves), passes[at].whole(out[len(through) :]) if at < len(passes) else None


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, passes: list[_Layer], at: int, token: Tensor | None, *xs: Tensor) -> Any:
        ctx.passes, ctx.at, ctx.has, ctx.device = passes, at, len(xs), None if token is None else token.device
        ctx.set_materialize_grads(False)
        out = [x.view_as(x) for x in xs]
        if at == len(passes):
            return tuple(out)
        layer = passes[at]
        found = [y for each in zip(layer.nodes, layer.leaves, layer.wait(), strict=True) for y in wholes(*each)]
        like = [x for own in layer.like for x in own]
        ctx.mark_non_differentiable(*(y for x, y in zip(like, found, strict=True) if x is None and y is not None))
        return *out, *found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fold_layers: its gradient is being recorded, to be differentiated again, which cut layers cannot be; give "
                "it gather_params(layers)"
            )
        passes, at = ctx.passes, ctx.at
        if at < len(passes):
            passes[at].let_go()
        # The next to compute first, since it is needed first.
        if at > 0 and passes[at - 1].recorded:
            passes[at - 1].wait()
        if at > 1 and passes[at - 2].recorded:
            passes[at - 2].start()
        token = None
        if ctx.needs_input_grad[2]:
            passes[at].start_sum(grads[ctx.has :])
            token = torch.empty(0, device=ctx.device)
        return None, None, token, *grads[: ctx.has]
