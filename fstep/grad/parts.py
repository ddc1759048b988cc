"""Which part of a rank's params each of its stages runs with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree

from fstep.grad.own import find
from fstep.grad.pieces import is_pieces
from fstep.grad.schedule import Schedule
from fstep.mesh.axis import Axis
from fstep.mesh.place import Stages
from fstep.tree import NAMESPACE, Tied


def stage_parts(function: str, params: Any, schedule: Schedule, axis: Axis) -> dict[int, Any]:
    """Return the params of each stage of this rank; a tied parameter is in every part that refers to it."""
    stages = schedule.stages_of(axis.rank)
    if not isinstance(params, Stages):
        if len(stages) == 1:
            return {stages[0]: params}
        raise ValueError(
            f"{function}: schedule {schedule.name!r} gives rank {axis.rank} the stages {', '.join(map(str, stages))}, and "
            f"params is a {type(params).__name__}; pass Stages({{{stages[0]}: ..., ...}}) with a subtree for each"
        )
    if sorted(params.parts) != list(stages):
        raise ValueError(
            f"{function}: params are Stages {sorted(params.parts)}, and schedule {schedule.name!r} gives rank {axis.rank} "
            f"the stages {list(stages)}; cut the params for this schedule"
        )
    return {stage: _with_tied(function, params.parts[stage], params.parts) for stage in stages}


def _with_tied(function: str, part: Any, parts: Mapping[int, Any]) -> Any:
    """Add to a stage's part the parameters that another part of this rank holds for it."""
    leaves = optree.tree_leaves(part, lambda x: isinstance(x, Tied), none_is_leaf=True, namespace=NAMESPACE)
    for tied in (x for x in leaves if isinstance(x, Tied)):
        keys = tied.to.split(".")
        if find(part, keys) is not None:
            continue
        found = next(((at, x) for at, x in (_unit(other, keys) for other in parts.values()) if x is not None), None)
        if found is None:
            raise ValueError(f"{function}: params are tied to {tied.to!r}, which this rank has not; give it a Copied")
        if (part := _put(part, *found)) is None:
            raise ValueError(
                f"{function}: params are tied to {tied.to!r}, for which a part of them has no place; make parts dicts, or "
                "give each that field"
            )
    return part


def _unit(tree: Any, keys: list[str]) -> tuple[list[str], Any]:
    """Return what is at a path, or the ZeRO unit around it, which is gathered as one; and the path to it."""
    if find(tree, keys) is None:
        return keys, None
    for depth in range(1, len(keys)):
        if is_pieces(unit := find(tree, keys[:depth])):
            return keys[:depth], unit
    return keys, find(tree, keys)


def _put(tree: Any, keys: list[str], value: Any) -> Any:
    """Return a tree with one more entry, or None if there is no place for it."""
    if not keys:
        return value
    if tree is None or isinstance(tree, Mapping):
        tree = tree or {}
        key = {str(k): k for k in tree}.get(keys[0], keys[0])
        return {**tree, key: _put(tree.get(key), keys[1:], value)}
    if optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE):
        return None
    node = optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=NAMESPACE)
    entries = [str(entry) for entry in node.entries]
    if keys[0] not in entries:
        return None
    at = entries.index(keys[0])
    children = list(node.children)
    children[at] = _put(children[at], keys[1:], value)
    return None if children[at] is None else node.unflatten_func(node.metadata, children)
