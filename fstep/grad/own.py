"""The params that one call differentiates: its own leaves, so that nobody else's ``.grad`` is touched.

    params    {"embed": E, "head": Tied("embed")}            what the caller holds
    own       {"embed": E', "embed#1": E'', "head": Tied("embed#1")}
    gradient  {"embed": E'.grad + E''.grad}

A tied parameter gets a leaf for each of its uses. Over microbatches each use is then summed by itself and the sums are added
at the end, as they are where the uses are on different ranks of a pipeline: the same additions, hence the same bits.

A ZeRO node gets a `Call`, so that what is sent for it is waited for where it is needed, and summed once a step if so wished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optree
from torch import Tensor

from fstep.grad.autodiff import Predicate, choose_trainable, private_leaf, read_grads
from fstep.grad.messages import tensors_of
from fstep.grad.pieces import Call, Pieces, is_pieces
from fstep.mesh.place import Stages
from fstep.tree import NAMESPACE, Tied, tree_leaves, tree_map, tree_replace_leaves


class Own:
    """A call's own copy of params: ``tree`` to compute with, ``leaves`` to add gradients to, then `grads`."""

    def __init__(self, params: Any, trainable: Predicate | None, *, none_is_fine: bool = False) -> None:
        self.given, self.chosen = params, choose_trainable(params, trainable, none_is_fine=none_is_fine)
        leaves = [
            private_leaf(x, recording=False) if mine else x.detach() if isinstance(x, Tensor) else x
            for x, mine in zip(tree_leaves(params), self.chosen, strict=True)
        ]
        self.params = [x for x, mine in zip(leaves, self.chosen, strict=True) if mine]
        tree = tree_replace_leaves(params, leaves)
        self.nodes: list[Any] = []  # whose gradients are wanted
        self.twins: list[tuple[Tensor, Tensor]] = []
        self.twin_nodes: list[tuple[Any, Any]] = []
        kinds = set(map(type, optree.tree_leaves(tree, _is_special, none_is_leaf=True, namespace=NAMESPACE)))
        if Pieces in kinds:
            tree = optree.tree_map(self._with_call, tree, is_leaf=is_pieces, none_is_leaf=True, namespace=NAMESPACE)
        self.tree = self._with_twins(tree) if Tied in kinds else tree
        self.leaves = [*self.params, *(twin for _, twin in self.twins)]

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
        for leaf, twin in self.twins:
            if leaf.grad is None:
                leaf.grad = twin.grad
            elif twin.grad is not None:
                leaf.grad += twin.grad
            twin.grad = None
        grads = iter(read_grads(self.params))
        return tree_replace_leaves(self.given, [next(grads) if mine else None for mine in self.chosen])

    def _with_call(self, x: Any) -> Any:
        if not is_pieces(x):
            return x
        node = replace(x, call=Call(len(x.slots)))
        self.nodes += [node] if any(leaf is not None for leaf in _wanted(node)) else []
        return node

    def _with_twins(self, tree: Any) -> Any:
        if isinstance(tree, Stages):
            return Stages({stage: self._untie(part, list(tree.parts.values())) for stage, part in tree.parts.items()})
        return self._untie(tree, [tree])

    def _untie(self, part: Any, parts: Sequence[Any]) -> Any:
        """Give every `Tied` of a stage a parameter of its own, beside the one it stands for."""
        leaves, spec = optree.tree_flatten(part, _is_tied, none_is_leaf=True, namespace=NAMESPACE)
        added: list[tuple[list[str], Any]] = []
        for n, tied in enumerate(leaves):
            if not _is_tied(tied):
                continue
            keys = tied.to.split(".")
            found = next((x for x in (find(other, keys) for other in (part, *parts)) if x is not None), None)
            # Beside numbered siblings there is no room for a name.
            siblings = [find(other, keys[:-1]) for other in (part, *parts)]
            named = all(isinstance(k, str) for s in siblings if isinstance(s, Mapping) for k in s)
            if found is None or not named or not any(x.requires_grad for x in tensors_of(found)):
                continue
            keys = [*keys[:-1], f"{keys[-1]}#{n}"]
            leaves[n] = Tied(".".join(keys))
            twin = optree.tree_map(self._twin, found, is_leaf=is_pieces, none_is_leaf=True, namespace=NAMESPACE)
            added.append((keys, twin))
        part = optree.tree_unflatten(spec, leaves)
        for keys, value in added:
            part = put(part, keys, value)
        return part

    def _twin(self, x: Any) -> Any:
        if is_pieces(x):
            self.twin_nodes.append((x, self._with_call(replace(x, value=tree_map(self._twin, x.value)))))
            return self.twin_nodes[-1][1]
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        self.twins.append((x, private_leaf(x, recording=False)))
        return self.twins[-1][1]


def _is_tied(x: Any) -> bool:
    return isinstance(x, Tied)


def _is_special(x: Any) -> bool:
    return isinstance(x, Tied | Pieces)


def _wanted(node: Pieces) -> list[Tensor | None]:
    return [x if isinstance(x, Tensor) and x.requires_grad else None for x in node.leaves()]


def find(tree: Any, keys: Sequence[str]) -> Any:
    """Return what is at a path in a tree of dicts, or None."""
    for key in keys:
        tree = {str(k): v for k, v in tree.items()}.get(key) if isinstance(tree, Mapping) else None
    return tree


def put(tree: Any, keys: Sequence[str], value: Any) -> Any:
    """Return a tree of dicts with one more entry."""
    if not keys:
        return value
    names = {str(k): k for k in tree}
    key = names.get(keys[0], keys[0])
    return {**tree, key: put(tree.get(key, {}), keys[1:], value)}
