"""Trees: paths, mapping, None, static fields, and the same dataclass seen by fstep, torch.func and torch.compile."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch.utils import _pytree as torch_pytree

import fstep
from fstep.tree import path_name

Pair = collections.namedtuple("Pair", "x y")


@fstep.pytree
class Layer:
    w: Any
    b: Any
    width: int = fstep.static(default=3)


def layer(scale: float = 1.0) -> Layer:
    return Layer(torch.tensor([1.0, 2.0]) * scale, torch.tensor(3.0) * scale)


TREE = {"z": [1, (2, None)], "a": {10: 3, 9: 4}, "p": Pair(5, 6), "l": Layer(7, None), "t": fstep.Tied("a")}
PATHS = ["a.9", "a.10", "l.w", "p.0", "p.1", "z.0", "z.1.0"]
LEAVES = [4, 3, 7, 5, 6, 1, 2]


def test_paths_and_leaves_in_one_order() -> None:
    # Keys sort as what they are: 9 before 10, which as strings would be the other way round.
    assert fstep.tree_paths(TREE) == PATHS
    assert fstep.tree_leaves(TREE) == LEAVES
    assert fstep.tree_paths(3) == [""]
    assert fstep.tree_leaves(None) == fstep.tree_paths(None) == fstep.tree_leaves({}) == []
    assert path_name(("layers", 3, "q")) == "layers.3.q"


def test_order_of_insertion_does_not_matter() -> None:
    a, b = {"x": 1, "y": 2}, {"y": 2, "x": 1}
    assert fstep.tree_leaves(a) == fstep.tree_leaves(b) == [1, 2]
    assert fstep.tree_map(lambda u, v: (u, v), a, b) == {"x": (1, 1), "y": (2, 2)}


def test_map_keeps_structure_and_none() -> None:
    out = fstep.tree_map(lambda x: x * 10, TREE)
    assert fstep.tree_paths(out) == PATHS
    assert fstep.tree_leaves(out) == [10 * x for x in LEAVES]
    assert out["z"][1][1] is None and out["l"].b is None
    assert isinstance(out["p"], Pair) and isinstance(out["l"], Layer) and out["l"].width == 3
    assert out["t"] == fstep.Tied("a")
    assert TREE["a"] == {10: 3, 9: 4}


def test_map_of_several_skips_where_the_first_is_none() -> None:
    grads = {"a": 0.5, "b": None, "c": 2.0}
    params = {"a": 1.0, "b": {"deeper": 7.0}, "c": None}
    assert fstep.tree_map(lambda g, p: (g, p), grads, params) == {"a": (0.5, 1.0), "b": None, "c": (2.0, None)}


def test_map_gives_a_whole_subtree_where_the_first_has_a_leaf() -> None:
    assert fstep.tree_map(lambda m, sub: sub if m else None, {"a": True, "b": False}, {"a": [1, 2], "b": 3}) == {
        "a": [1, 2],
        "b": None,
    }


def test_map_with_path() -> None:
    seen = fstep.tree_map_with_path(lambda path, x, y: f"{path}={x}+{y}", TREE, TREE)
    assert fstep.tree_leaves(seen) == [f"{p}={x}+{x}" for p, x in zip(PATHS, LEAVES, strict=True)]
    assert seen["z"][1][1] is None


@pytest.mark.parametrize("name", ["tree_map", "tree_map_with_path", "tree_merge"])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": {"x": 1}, "b": 2}, {"a": {"y": 1}, "b": 2}, "tree 2 has nothing at 'a.x', where the first has a leaf"),
        ({"a": {"x": 1}}, {"a": 3}, "tree 2 has nothing at 'a.x'"),
        ({"a": 1}, {"a": 1, "ab": 2}, "tree 2 has a leaf 'ab' that the first has not"),
        ([1, 2], [1], "tree 2 has nothing at '1'"),
        ([1, 2], (1, 2), "the trees have nodes of different types"),
    ],
)
def test_another_structure_is_named_by_its_path(name: str, first: Any, second: Any, message: str) -> None:
    call = {
        "tree_map": lambda: fstep.tree_map(lambda a, b: a, first, second),
        "tree_map_with_path": lambda: fstep.tree_map_with_path(lambda p, a, b: a, first, second),
        "tree_merge": lambda: fstep.tree_merge(first, second),
    }[name]
    with pytest.raises(ValueError, match=f"^{name}: {message}.*; pass trees of the same structure"):
        call()


def test_third_tree_is_called_the_third() -> None:
    with pytest.raises(ValueError, match="tree_map: tree 3 has nothing at 'a'"):
        fstep.tree_map(lambda *x: x, {"a": 1}, {"a": 1}, {"b": 1})


def test_an_error_of_the_mapped_function_is_its_own() -> None:
    def fail(x: int, y: int) -> int:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        fstep.tree_map(fail, {"a": 1}, {"a": 1})


def test_replace_leaves_inverts_leaves() -> None:
    assert fstep.tree_replace_leaves(TREE, fstep.tree_leaves(TREE)) == TREE
    new = fstep.tree_replace_leaves(TREE, (x + 1 for x in LEAVES))
    assert fstep.tree_leaves(new) == [x + 1 for x in LEAVES]


@pytest.mark.parametrize(("given", "count"), [([10], 1), ([], 0), ([10, 20, 30], 3), ([10, 20, None], 3)])
def test_replace_leaves_wants_one_for_each(given: list[Any], count: int) -> None:
    with pytest.raises(
        ValueError, match=rf"tree_replace_leaves: {count} leaves given and the tree has 2; pass one for each"
    ):
        fstep.tree_replace_leaves({"a": 1, "b": None, "c": 2}, given)


def test_merge_inverts_a_split() -> None:
    first = fstep.tree_map_with_path(lambda p, x: x if p.startswith("a") else None, TREE)
    second = fstep.tree_map_with_path(lambda p, x: None if p.startswith("a") else x, TREE)
    assert fstep.tree_merge(first, second) == fstep.tree_merge(second, first) == TREE
    assert fstep.tree_merge({"a": 1}, {"a": 2}) == {"a": 1}


def test_pytree_is_a_frozen_dataclass() -> None:
    x = layer()
    with pytest.raises(dataclasses.FrozenInstanceError):
        x.w = torch.zeros(2)  # type: ignore[misc]
    wider = dataclasses.replace(x, width=4)
    assert (x.width, wider.width) == (3, 4)
    with pytest.raises(ValueError, match="tree_map"):  # the static field belongs to the structure
        fstep.tree_map(lambda a, b: a, x, wider)


def test_subclass_of_a_pytree_has_both_fields() -> None:
    @fstep.pytree
    class Wider(Layer):
        more: Any = None

    x = Wider(1, 2, 3, more=4)
    assert fstep.tree_paths(x) == ["w", "b", "more"]
    assert isinstance(fstep.tree_map(lambda v: v, x), Wider)


def test_torch_sees_the_same_leaves_without_running_init() -> None:
    x = layer()
    leaves, spec = torch_pytree.tree_flatten(x)
    assert [id(v) for v in leaves] == [id(x.w), id(x.b)]
    again = torch_pytree.tree_unflatten(["anything", 5], spec)
    assert (type(again), again.w, again.b, again.width) == (Layer, "anything", 5, 3)
    named, _ = torch_pytree.tree_flatten_with_path({"k": x})
    assert [torch_pytree.keystr(path) for path, _ in named] == ["['k'].w", "['k'].b"]
    # A different static value is a different structure, so compiled code is not reused for it.
    assert torch_pytree.tree_structure(x) != torch_pytree.tree_structure(dataclasses.replace(x, width=4))


def test_torch_func_takes_and_returns_a_pytree() -> None:
    grads = torch.func.grad(lambda p: (p.w**2).sum() * p.b)(layer())
    assert isinstance(grads, Layer)
    assert grads.w.tolist() == [6.0, 12.0] and float(grads.b) == 5.0 and grads.width == 3
    stacked = fstep.tree_map(lambda a, b: torch.stack([a, b]), layer(), layer(2.0))
    out = torch.func.vmap(lambda p: Layer(p.w * p.b, p.b))(stacked)
    assert out.w.tolist() == [[3.0, 6.0], [12.0, 24.0]]


def test_compile_makes_one_graph_for_one_static_value() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    double = torch.compile(lambda p: fstep.tree_map(lambda x: x * p.width, p), backend=backend, fullgraph=True)
    for scale in (1.0, 2.0):
        assert double(layer(scale)).w.tolist() == [3 * scale, 6 * scale]
    assert len(graphs) == 1
    assert double(dataclasses.replace(layer(), width=5)).w.tolist() == [5.0, 10.0]
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_cast_converts_floats_only() -> None:
    tree = {"w": torch.ones(2), "h": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3), "f": torch.tensor(True),
            "none": None, "s": "text", "c": torch.ones(1, dtype=torch.complex64)}  # fmt: skip
    out = fstep.cast(tree, torch.bfloat16)
    kinds = {k: getattr(v, "dtype", v) for k, v in out.items()}
    assert kinds == {"w": torch.bfloat16, "h": torch.bfloat16, "n": torch.int64, "f": torch.bool, "none": None, "s": "text",
                     "c": torch.complex64}  # fmt: skip
    assert fstep.cast(tree, None) is tree
    assert tree["w"].dtype == torch.float32
    assert fstep.cast(tree, torch.float32)["w"] is tree["w"]


def test_cast_inside_the_differentiated_function_gives_gradients_in_the_old_dtype() -> None:
    params = {"w": torch.tensor([1.0, 2.0])}
    value, grads = fstep.value_and_grad(lambda p: fstep.cast(p, torch.bfloat16)["w"].sum())(params)
    assert value.dtype == torch.bfloat16 and grads["w"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_cast_to_what_is_no_float_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"cast: {dtype} would round.*; pass a floating-point dtype"):
        fstep.cast({"w": torch.ones(1)}, dtype)


def test_to_device() -> None:
    tree = {"w": torch.ones(1), "n": 3, "none": None}
    out = fstep.to_device(tree, "cpu")
    assert out["w"] is tree["w"] and out["n"] == 3 and out["none"] is None
    meta = fstep.to_device(tree, torch.device("meta"))
    assert meta["w"].is_meta and not tree["w"].is_meta


def test_to_device_does_not_run_ahead_of_a_copy_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch copies from a GPU to the CPU asynchronously if asked to, and the result holds garbage until it is done.
    asked = []
    plain = torch.Tensor.to

    def to(self: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        asked.append((str(device), non_blocking))
        return plain(self, device, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", to)
    fstep.to_device(torch.ones(1), "cpu")
    fstep.to_device(torch.ones(1), torch.device("cpu"))
    fstep.to_device(torch.ones(1), "meta")
    assert asked == [("cpu", False), ("cpu", False), ("meta", True)]


def test_tied_has_no_leaf_and_is_a_value() -> None:
    params = {"embed": torch.ones(2), "head": fstep.Tied("embed")}
    assert fstep.tree_paths(params) == ["embed"]
    assert fstep.tree_map(lambda x: x * 2, params)["head"] == fstep.Tied("embed") != fstep.Tied("other")


def test_is_recording_sees_what_would_be_recorded() -> None:
    leaf = torch.ones(1, requires_grad=True)
    assert fstep.is_recording({"x": [leaf]}) and fstep.is_recording(1, {"n": torch.ones(1)}, leaf)
    assert not fstep.is_recording({"x": leaf.detach(), "none": None, "n": 3})
    with torch.no_grad():
        assert not fstep.is_recording(leaf)
    seen = []
    torch.func.grad(lambda x: (seen.append((fstep.in_transform(), fstep.is_recording(torch.ones(1)))), x.sum())[1])(
        torch.ones(1)
    )
    torch.func.vmap(lambda x: (seen.append((fstep.in_transform(), fstep.is_recording())), x)[1])(torch.ones(1))
    assert seen == [(True, True), (True, True)]
    assert not fstep.in_transform()
