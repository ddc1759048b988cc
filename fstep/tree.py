"""Trees: nested dicts, tuples and frozen dataclasses with tensors at the leaves.

Params, gradients, batches and states are trees. A leaf is named by its path, the keys joined by dots::

    {"embed": E, "layers": {0: {"q": Q}}}        embed
                                                 layers.0.q

``None`` stands for "nothing here": it is no leaf, and a function mapped over a tree leaves it alone. The gradient of a
frozen parameter is ``None``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import optree
import torch
import torch.utils._pytree as torch_pytree
from typing_extensions import dataclass_transform

NAMESPACE = "fstep"
T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Declare a dataclass field that is part of the tree's structure and no leaf.

    Only what decides shapes belongs here: two trees with different static values have different structures, and
    `torch.compile` compiles once for each.

    >>> import torch, fstep
    >>> @fstep.pytree
    ... class Box:
    ...     x: torch.Tensor
    ...     width: int = fstep.static(default=3)
    >>> fstep.tree_leaves(Box(torch.tensor(1.0)))
    [tensor(1.)]
    """
    return optree.dataclasses.field(pytree_node=False, **kwargs)  # type: ignore[call-overload]


@dataclass_transform(frozen_default=True, field_specifiers=(static, optree.dataclasses.field, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make a class an immutable dataclass that is also a tree, for fstep, `torch.func` and `torch.compile` alike.

    Its fields are the tree's children, except those declared with `static`. Change one with `dataclasses.replace`.

    >>> import torch, fstep
    >>> @fstep.pytree
    ... class Point:
    ...     x: torch.Tensor
    ...     y: torch.Tensor
    >>> p = Point(torch.tensor(1.0), torch.tensor(2.0))
    >>> fstep.tree_map(lambda v: v * 10, p)
    Point(x=tensor(10.), y=tensor(20.))
    """
    cls = optree.dataclasses.dataclass(cls, frozen=True, namespace=NAMESPACE)  # type: ignore[call-overload]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    is_child = [f.metadata.get("pytree_node", True) for f in fields]
    children = tuple(f.name for f, child in zip(fields, is_child, strict=True) if child)
    statics = tuple(f.name for f, child in zip(fields, is_child, strict=True) if not child)

    def flatten(x: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, name) for name in children], tuple(getattr(x, name) for name in statics)

    def unflatten(values: Iterable[Any], context: tuple[Any, ...]) -> T:
        # Rebuilt without __init__: a tree of gradients or of shapes has the same nodes but not the same leaves.
        x = object.__new__(cls)
        for name, value in zip((*children, *statics), (*values, *context), strict=True):
            object.__setattr__(x, name, value)
        return x

    _register_with_torch(cls, flatten, unflatten, lambda x: children)
    return cls


Flatten = Callable[[Any], tuple[list[Any], Any]]


def unnamed_node(cls: type[T], flatten: Flatten, unflatten: Callable[[Iterable[Any], Any], T]) -> type[T]:
    """Make a class a node of trees that adds nothing to the paths below it: it says where a value lives, not what it is.

    ``flatten(x)`` returns its children and what else it is made of; ``unflatten`` puts the two together again.
    """

    def flatten_unnamed(x: T) -> tuple[list[Any], Any, list[str]]:
        children, context = flatten(x)
        return children, context, [""] * len(children)

    register: Any = optree.register_pytree_node  # its types want a collection
    register(cls, flatten_unnamed, lambda context, children: unflatten(children, context), namespace=NAMESPACE)
    _register_with_torch(cls, flatten, unflatten, lambda x: [""] * len(flatten(x)[0]))
    return cls


def _register_with_torch(cls: type, flatten: Flatten, unflatten: Any, names: Callable[[Any], Iterable[str]]) -> None:
    def with_keys(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values, context = flatten(x)
        return [(torch_pytree.GetAttrKey(n), v) for n, v in zip(names(x), values, strict=True)], context

    torch_pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def check_type(function: str, argument: str, value: Any, wanted: type | tuple[type, ...], fix: str) -> None:
    """Raise TypeError, naming function, argument, what was given and what to pass, unless the type is right."""
    if not isinstance(value, wanted):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; pass {fix}")


def check_callable(function: str, argument: str, value: Any) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; pass a function")


def path_name(path: Iterable[Any]) -> str:
    """Write a path as its keys joined by dots; an `unnamed_node` leaves an empty one."""
    return ".".join(str(key) for key in path if key != "")


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


def _rows(function: str, tree: Any, rest: Iterable[Any]) -> tuple[list[tuple[Any, ...]], Any]:
    """Return what the trees hold at each place of ``tree``, and its structure."""
    leaves, spec = _flatten(tree)
    try:
        others = [spec.flatten_up_to(other) for other in rest]
    except ValueError as error:
        # The tree library names types and keys; whoever reads the error wants the path.
        raise ValueError(f"{function}: {_difference(tree, rest)}; pass trees of the same structure") from error
    return list(zip(leaves, *others, strict=True)), spec


def _difference(tree: Any, rest: Iterable[Any]) -> str:
    def places(x: Any) -> list[str]:
        return [path_name(p) for p in optree.tree_flatten_with_path(x, none_is_leaf=True, namespace=NAMESPACE)[0]]

    def lacks(there: list[str], path: str) -> bool:
        return not any(q == path or q.startswith(f"{path}.") for q in there)

    first = places(tree)
    for number, other in enumerate(rest, 2):
        there = places(other)
        for path in first:
            if lacks(there, path):
                return f"tree {number} has nothing at {path!r}, where the first has a leaf"
        for path in there:
            if not any(path == q or path.startswith(f"{q}.") for q in first):
                return f"tree {number} has a leaf {path!r} that the first has not"
    return "the trees have nodes of different types"


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f`` to each leaf of ``tree`` (and to the leaves at the same places of ``rest``), keeping the structure.

    Where ``tree`` holds ``None`` the result holds ``None``, whatever the other trees hold there, so gradients of a
    partly frozen model map over its params.

    Raises ValueError naming the first path at which the structures differ.

    >>> import torch, fstep
    >>> params, grads = {"a": 1.0, "b": 2.0}, {"a": 0.5, "b": None}
    >>> fstep.tree_map(lambda g, p: p - g, grads, params)
    {'a': 0.5, 'b': None}
    """
    rows, spec = _rows("tree_map", tree, rest)
    return optree.tree_unflatten(spec, [None if leaf is None else f(leaf, *more) for leaf, *more in rows])


def tree_rows(tree: Any, *rest: Any) -> list[tuple[Any, ...]]:
    """Return each leaf of ``tree`` beside what the other trees hold at its place; raises like `tree_map`."""
    return [row for row in _rows("tree_rows", tree, rest)[0] if row[0] is not None]


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree in the order of their paths (dict keys sorted), without the ``None`` places.

    >>> import fstep
    >>> fstep.tree_leaves({"b": 2, "a": (1, None)})
    [1, 2]
    """
    return [leaf for leaf in _flatten(tree)[0] if leaf is not None]


def tree_paths(tree: Any) -> list[str]:
    """Return the path of every leaf, in the order of `tree_leaves`.

    >>> import fstep
    >>> fstep.tree_paths({"layers": {10: 1, 9: 2}, "embed": 3})
    ['embed', 'layers.9', 'layers.10']
    """
    paths, leaves, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [path_name(p) for p, leaf in zip(paths, leaves, strict=True) if leaf is not None]


def tree_map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f(path, leaf, *more)`` to each leaf; otherwise like `tree_map`.

    >>> import fstep
    >>> fstep.tree_map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a.b=1'}}
    """
    rows, spec = _rows("tree_map_with_path", tree, rest)
    named = zip(spec.paths(), rows, strict=True)
    out = [None if row[0] is None else f(path_name(path), *row) for path, row in named]
    return optree.tree_unflatten(spec, out)


def tree_replace_leaves(tree: Any, leaves: Iterable[Any]) -> Any:
    """Return ``tree`` with its leaves, in the order of `tree_leaves`, replaced by ``leaves``.

    Raises ValueError unless there is one for each.

    >>> import fstep
    >>> fstep.tree_replace_leaves({"a": 1, "b": None, "c": 2}, [10, 20])
    {'a': 10, 'b': None, 'c': 20}
    """
    old, spec = _flatten(tree)
    at, new = [i for i, leaf in enumerate(old) if leaf is not None], list(leaves)
    if len(new) != len(at):
        found = f"{len(new)} leaves given and the tree has {len(at)}"
        raise ValueError(f"tree_replace_leaves: {found}; pass one for each of tree_leaves(tree)")
    for i, leaf in zip(at, new, strict=True):
        old[i] = leaf
    return optree.tree_unflatten(spec, old)


def tree_merge(first: Any, second: Any) -> Any:
    """Put two trees of one structure together: each leaf from ``first``, or from ``second`` where ``first`` has ``None``.

    >>> import fstep
    >>> fstep.tree_merge({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    rows, spec = _rows("tree_merge", first, [second])
    return optree.tree_unflatten(spec, [b if a is None else a for a, b in rows])


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Convert every floating-point leaf to ``dtype``; integers stay as they are, and ``None`` changes nothing.

    Called inside the differentiated function it is mixed precision: the params stay float32, the computation runs in
    bfloat16, and the gradient arrives in float32 again. Raises TypeError for a ``dtype`` that is not floating-point.

    >>> import torch, fstep
    >>> fstep.cast({"w": torch.ones(2), "n": torch.tensor(3)}, torch.bfloat16)
    {'w': tensor([1., 1.], dtype=torch.bfloat16), 'n': tensor(3)}
    """
    if dtype is None:
        return tree
    if not dtype.is_floating_point:
        raise TypeError(f"cast: {dtype} would round every value to a whole number; pass a floating-point dtype")

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(convert, tree)


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Return the tree with every tensor on ``device``; tensors that are there already are not copied.

    >>> import torch, fstep
    >>> fstep.to_device({"w": torch.ones(1)}, "cpu")
    {'w': tensor([1.])}
    """
    # To the CPU one has to wait: an unfinished copy would be read as whatever was in that memory before.
    ahead = torch.device(device).type != "cpu"
    return tree_map(lambda x: x.to(device, non_blocking=ahead) if isinstance(x, torch.Tensor) else x, tree)


@pytree
class Tied:
    """Stands where a parameter would be that is another one: it has no leaf, so it cannot be trained apart.

    A model whose head is its embedding has ``params["head"] == Tied("embed")``: one leaf, one gradient, one optimizer
    state. ``to`` is the path of the parameter that is shared; look it up there, ``params[params["head"].to]``.

    >>> import torch, fstep
    >>> fstep.tree_paths({"embed": torch.ones(2, 2), "head": fstep.Tied("embed")})
    ['embed']
    """

    to: str = static()

    def __post_init__(self) -> None:
        check_type("Tied", "to", self.to, str, 'the path of a parameter, e.g. Tied("embed")')
