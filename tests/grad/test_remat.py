"""remat: the same bits, less memory between the passes, more operations in the second."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fstep.grad.autodiff import value_and_grad, vjp
from fstep.grad.remat import remat
from fstep.tree import tree_leaves

MM = torch.ops.aten.mm.default
POLICIES: dict[str, Any] = {
    "none": "none",
    "full": "full",
    "mm": [MM],
    "mm as a tuple": (MM,),
    "tanh": [torch.ops.aten.tanh.default],
}


def block(p: Any, x: Tensor, *, gain: float = 1.0) -> Tensor:
    return x + gain * torch.tanh(x @ p["up"]).square().sin() @ p["down"]


def model(p: Any, x: Tensor, run: Callable = block) -> Tensor:
    for layer in p:
        x = run(layer, x, gain=0.5)
    return x.square().sum()


def inputs() -> tuple[Any, Tensor]:
    def layer() -> Any:
        return {"up": torch.randn(4, 16, dtype=torch.float64), "down": torch.randn(16, 4, dtype=torch.float64)}

    return [layer() for _ in range(3)], torch.randn(32, 4, dtype=torch.float64)


class Watch(TorchDispatchMode):
    """Count operations, and know which results are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter = Counter()
        self.results: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops[func] += 1
        self.results += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out

    def alive(self, given: Any) -> int:
        """Count the bytes of results that are still held, without those that are views of what was given."""
        owned = {x.untyped_storage().data_ptr() for x in tree_leaves(given)}
        storages = [x.untyped_storage() for r in self.results if (x := r()) is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in owned}.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits(policy: str) -> None:
    p, x = inputs()
    got = value_and_grad(lambda p, x: model(p, x, remat(block, POLICIES[policy])), (0, 1))(p, x)
    expected = value_and_grad(model, (0, 1))(p, x)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True))


def watched(policy: Any) -> tuple[int, Counter, Counter]:
    """Bytes alive between the passes, and the operations of each pass."""
    p, x = inputs()
    run = remat(block, policy)
    with Watch() as watch:
        y, pull = vjp(lambda p, x: model(p, x, run), p, x)
    alive, forward = watch.alive((p, x)), Counter(watch.ops)
    with watch:
        pull(torch.ones_like(y))
    return alive, forward, watch.ops - forward


def test_memory_and_recomputation() -> None:
    tanh = torch.ops.aten.tanh.default
    results = {policy: watched(POLICIES[policy]) for policy in ("none", "full", "mm", "tanh")}
    alive = {policy: bytes_ for policy, (bytes_, _, _) in results.items()}
    row = 32 * 4 * 8  # a [32, 4] result; one [32, 16] is four of them
    assert alive["full"] == 3 * row + 8  # the inputs of blocks 1 and 2, what is squared, and the scalar
    assert alive["mm"] >= alive["full"] + 3 * 4 * row
    assert alive["none"] >= alive["mm"] + 3 * 4 * row
    forward = {policy: ops[tanh] for policy, (_, ops, _) in results.items()}
    again = {policy: ops[tanh] for policy, (_, _, ops) in results.items()}
    assert set(forward.values()) == {3}
    assert again == {"none": 0, "full": 3, "mm": 3, "tanh": 0}
    products = {policy: ops[MM] for policy, (_, _, ops) in results.items()}
    assert products["none"] == products["mm"] == 12  # four of each layer's backward pass
    assert products["full"] == 15  # and the first one of each layer again; torch stops there, as nothing needs the second


def test_none_is_the_function_itself() -> None:
    assert remat(block, "none") is block


def test_twice_differentiated() -> None:
    p, x = inputs()

    def norm(run: Callable) -> Callable:
        return lambda p: sum(g.square().sum() for g in tree_leaves(value_and_grad(lambda p: model(p, x, run))(p)[1]))

    got, expected = value_and_grad(norm(remat(block)))(p), value_and_grad(norm(block))(p)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["full", "mm"])
def test_under_torch_func_it_is_the_function(policy: str) -> None:
    p, x = inputs()
    run = remat(block, POLICIES[policy])
    got = torch.func.grad(lambda p: model(p, x, run))(p)
    expected = torch.func.grad(lambda p: model(p, x))(p)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True))
    xs = torch.stack([x, 2 * x])
    assert torch.equal(torch.func.vmap(lambda x: model(p, x, run))(xs), torch.func.vmap(lambda x: model(p, x))(xs))
    mine, theirs = (
        torch.func.vmap(torch.func.grad(lambda p, x, r=r: model(p, x, r)), in_dims=(None, 0))(p, xs) for r in (run, block)
    )
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(mine), tree_leaves(theirs), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("policy", ["full", "mm"])
def test_inside_compile(policy: str) -> None:
    """Wrapped first and compiled then, the partitioner computes again what the policy says."""
    p, x = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(remat(block, POLICIES[policy]), backend="aot_eager", fullgraph=True)
    got = value_and_grad(lambda p: model(p, x, compiled))(p)
    expected = value_and_grad(lambda p: model(p, x))(p)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    torch._dynamo.reset()


def test_arguments_that_need_no_gradient() -> None:
    assert torch.equal(remat(torch.sin)(torch.ones(2)), torch.ones(2).sin())
    with torch.no_grad():
        assert not remat(torch.sin)(torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("all", ValueError, "remat: policy 'all' is unknown; pass 'none', 'full' or a list of operations to keep"),
        (None, TypeError, "remat: policy None is no list of operations; pass 'none', 'full' or"),
        ([torch.mm], TypeError, "is no list of operations; .*to be an OpOverload"),
        ([torch.ops.aten.mm], TypeError, r"is no list of operations; .*change it to `torch.ops.aten.mm.default`"),
    ],
)
def test_bad_policy_fails_when_it_is_given(policy: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        remat(block, policy)
