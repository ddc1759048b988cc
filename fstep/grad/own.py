"""The params that one call differentiates: its own leaves, so that nobody else's ``.grad`` is touched.

    params      {"embed": E, "head": Tied("embed")}       what the caller holds
    tree        {"embed": E', "head": Tied("embed")}      what the stages compute with
    last        {"embed": E'', "head": Tied("embed")}     what the loss computes with
    gradient    {"embed": E'.grad + E''.grad}

A tied parameter has another leaf for the loss. Over microbatches each use is then summed by itself and the sums are added at
the end, as they are where the uses are on different ranks of a pipeline: the same additions, hence the same bits.

A ZeRO node gets a `Call`, so that what is sent for it is waited for where it is needed, and summed once a step if so wished.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import optree
from torch import Tensor

from fstep.grad.autodiff import Predicate, choose_trainable, private_leaf, read_grads
from fstep.grad.call import Call
from fstep.grad.messages import tensors_of
from fstep.grad.pieces import Pieces, is_pieces
from fstep.mesh.place import Stages
from fstep.tree import NAMESPACE, Tied, tree_map


class Walk:
    """What is in params: they have hundreds of leaves, and a call goes through them once."""

    def __init__(self, params: Any) -> None:
        self.params = params
        self.inside, self.spec = optree.tree_flatten(params, _is_special, none_is_leaf=True, namespace=NAMESPACE)
        each = (x.leaves() if is_pieces(x) else (x,) for x in self.inside)
        self.leaves = [x for xs in each for x in xs if x is not None and not _is_tied(x)]
        self.tied = [y for x in self.inside if _is_special(x) for y in _tied_in(x)]

    def replaced(self, leaves: Iterable[Any]) -> list[Any]:
        """Return what is inside, with other leaves."""
        new = iter(leaves)
        return [
            replace(x, value=tree_map(lambda _: next(new), x.value)) if is_pieces(x)
            else x if x is None or _is_tied(x)
            else next(new)
            for x in self.inside
        ]  # fmt: skip

    def tree(self, inside: Iterable[Any]) -> Any:
        """Return the tree with something else inside."""
        return optree.tree_unflatten(self.spec, inside)


class Own:
    """A call's own copy of params: ``tree`` to compute with, ``leaves`` to add gradients to, then `grads`."""

    def __init__(self, given: Walk, trainable: Predicate | None, *, none_is_fine: bool = False) -> None:
        self.given = given
        self.chosen = choose_trainable(given.params, trainable, none_is_fine=none_is_fine, leaves=given.leaves)
        leaves = [
            private_leaf(x, recording=False) if mine else x.detach() if isinstance(x, Tensor) else x
            for x, mine in zip(given.leaves, self.chosen, strict=True)
        ]
        self.params = [x for x, mine in zip(leaves, self.chosen, strict=True) if mine]
        self.nodes: list[Any] = []  # whose gradients are wanted
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the leaf
        self.twin_nodes: list[tuple[Any, Any]] = []
        inside = [self._with_call(x) for x in given.replaced(leaves)]
        self.tree = self.last = given.tree(inside)
        if self._find_twins(given.tied):
            self.last = given.tree([self._twin(x) for x in inside])
        self.leaves = [*self.params, *(twin for _, twin in self.twins.values())]

    def grads(self) -> Any:
        """Return what was accumulated, in the structure of the params; zeros where nothing depended on a leaf."""
        for node, twin in self.twin_nodes:
            if node.sums == "step":  # the two are added before their sum over the ranks, as without ZeRO
                node.call.add(node, _wanted(node), twin.call.whole)
                self.nodes = [x for x in self.nodes if x is not twin]
        for node in self.nodes:
            node.call.start(node, _wanted(node))
        for node in self.nodes:
            like = _wanted(node)
            for leaf, grad in zip(like, node.call.finish(node, like), strict=True):
                if leaf is not None and grad is not None:
                    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
        for leaf, twin in self.twins.values():
            if leaf.grad is None:
                leaf.grad = twin.grad
            elif twin.grad is not None:
                leaf.grad += twin.grad
            twin.grad = None
        grads = iter(read_grads(self.params))
        return self.given.tree(self.given.replaced(next(grads) if mine else None for mine in self.chosen))

    def _with_call(self, x: Any) -> Any:
        if not is_pieces(x):
            return x
        node = replace(x, call=Call(x.leaves()))
        self.nodes += [node] if any(leaf is not None for leaf in _wanted(node)) else []
        return node

    def _find_twins(self, tied: Sequence[Tied]) -> bool:
        """Make a second leaf of everything that a `Tied` stands for, wherever on this rank that is."""
        parts = list(self.tree.parts.values()) if isinstance(self.tree, Stages) else [self.tree]
        for keys in {tuple(x.to.split(".")) for x in tied}:
            for leaf in (x for part in parts for x in tensors_of(find(part, keys)) if x.requires_grad):
                self.twins[id(leaf)] = leaf, private_leaf(leaf, recording=False)
        return bool(self.twins)

    def _twin(self, x: Any) -> Any:
        if not is_pieces(x):
            return self.twins[id(x)][1] if id(x) in self.twins else x
        if not any(id(leaf) in self.twins for leaf in x.leaves()):
            return x
        new = self._with_call(replace(x, value=tree_map(self._twin, x.value)))
        self.twin_nodes.append((x, new))
        return new


def _is_tied(x: Any) -> bool:
    return isinstance(x, Tied)


def _tied_in(x: Any) -> list[Tied]:
    leaves = optree.tree_leaves(x.value, _is_tied, none_is_leaf=True, namespace=NAMESPACE) if is_pieces(x) else [x]
    return [y for y in leaves if isinstance(y, Tied)]


def _is_special(x: Any) -> bool:
    return isinstance(x, Tied | Pieces)


def _wanted(node: Pieces) -> list[Tensor | None]:
    return [x if isinstance(x, Tensor) and x.requires_grad else None for x in node.leaves()]


def find(tree: Any, keys: Sequence[str]) -> Any:
    """Return what is at a path of a tree, or None; nodes that say where a value lives are no part of the path."""
    if not keys or tree is None or optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE):
        return None if keys else tree
    node = optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=NAMESPACE)
    for child, entry in zip(node.children, node.entries, strict=True):
        found = find(child, keys) if entry == "" else find(child, keys[1:]) if str(entry) == keys[0] else None
        if found is not None:
            return found
    return None
