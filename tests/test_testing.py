"""The helpers see what they are for, name it, and see nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fstep
from fstep.testing import assert_pure, assert_trees_close

W = torch.tensor([3.0, 4.0], dtype=torch.float64)  # of norm 5


def test_close_trees_pass() -> None:
    tree = {"w": W, "n": torch.tensor([1, 2]), "none": None, "s": "text", "f": torch.tensor([math.nan, -math.inf, 1.0])}
    assert_trees_close(tree, tree)
    assert_trees_close({**tree, "w": W * (1 + 1e-11)}, tree)
    assert_trees_close({"x": W.clone().requires_grad_()}, {"x": W})
    assert_trees_close((1, math.nan, torch.zeros(0)), (1, math.nan, torch.zeros(0)), rtol=0)
    assert_trees_close({"z": torch.zeros(2)}, {"z": torch.zeros(2)}, rtol=0)


def test_tolerance_is_relative_to_the_norm_of_the_leaf() -> None:
    off = W + torch.tensor([0.0, 1e-3], dtype=torch.float64)  # 1e-3 of 5: 2e-4
    assert_trees_close(off, W, rtol=2.01e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(off, W, rtol=1.99e-4)
    assert_trees_close(off, W, rtol=0, atol=1.01e-3)
    assert_trees_close(off, W, rtol=1e-4, atol=0.51e-3)
    with pytest.raises(AssertionError):
        assert_trees_close(off, W, rtol=0, atol=0.99e-3)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (
            {"a": {"b": 2 * W}},
            {"a": {"b": W}},
            r"'a.b' is off by 1.0e\+00, rtol=1e-10, atol=0; \|actual\| 10, \|expected\| 5",
        ),
        ({"a": 0 * W}, {"a": W}, r"'a' is off by 1.0e\+00.*\|actual\| 0, \|expected\| 5"),
        ({"a": W}, {"a": 0 * W}, r"'a' is off by inf"),
        ({"a": W.float()}, {"a": W}, r"'a' is torch.float32 \(2,\), expected torch.float64 \(2,\)"),
        ({"a": W[:1]}, {"a": W}, r"'a' is torch.float64 \(1,\), expected torch.float64 \(2,\)"),
        ({"a": W}, {"a": W, "b": W}, r"actual has no leaf \['b'\] that expected has"),
        ({"a": W, "b": W}, {"a": W}, r"and has \['b'\] more"),
        ({"a": None}, {"a": W}, r"actual has no leaf \['a'\]"),
        ({"a": W * math.nan}, {"a": W}, "'a' differs in 2 of 2 values by an infinity or NaN"),
        ({"a": W}, {"a": W * math.inf}, "'a' differs in 2 of 2 values by an infinity or NaN"),
        ({"a": torch.tensor([1, 2])}, {"a": torch.tensor([1, 3])}, "'a' differs in 1 of 2 torch.int64 values"),
        ({"a": torch.tensor([True])}, {"a": torch.tensor([False])}, "'a' differs in 1 of 1 torch.bool values"),
        ({"a": 1}, {"a": 2}, "'a' is 1, expected 2"),
        ({"a": 1}, {"a": True}, "'a' is 1, expected True"),
        ({"a": W}, {"a": 3.0}, r"'a' is tensor\(.*, expected 3.0"),
    ],
)
def test_difference_is_named(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^assert_trees_close: .*{message}"):
        assert_trees_close(actual, expected)


def test_the_worst_leaf_is_named() -> None:
    with pytest.raises(AssertionError, match="'b' is off by"):
        assert_trees_close({"a": W * 1.1, "b": W * 1.5, "c": W * 1.2}, {"a": W, "b": W, "c": W})


def test_float32_differences_are_not_rounded_away() -> None:
    big = torch.full((4,), 1e30)  # whose squares overflow in float32
    with pytest.raises(AssertionError, match=r"off by 1.0e\+00"):
        assert_trees_close(2 * big, big)
    assert_trees_close(big, big)


def test_pure_function_passes_and_its_result_is_returned() -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.zeros(2)
    assert assert_pure(lambda a, b, *, c: (a["x"] * c).sum() + b, {"x": x, "k": "text"}, 1, c=torch.tensor(2.0)).item() == 5
    assert assert_pure(lambda: 3) == 3
    fresh: dict[str, Any] = assert_pure(lambda tree: {**tree, "more": 1}, {"x": x})
    assert fresh["more"] == 1


def write_bits_alone(tree: dict[str, torch.Tensor]) -> None:
    tree["x"].detach().numpy()[0] = 7  # no version counts this


def write_grad(tree: dict[str, torch.Tensor]) -> None:
    (tree["x"] * 2).sum().backward()


def draw_and_return(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return tree["x"] + torch.rand(2)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda tree: tree["x"].detach().mul_(1), r"args\[0\].x was written to in place \(version \d+ became \d+\)"),
        (write_bits_alone, r"args\[0\].x has other bits than before"),
        (write_grad, r"args\[0\].x.grad is not what it was"),
        (lambda tree: tree["x"].requires_grad_(False), r"args\[0\].x.requires_grad is not what it was"),
        (lambda tree: tree.update(y=torch.ones(1)), "the arguments hold other leaves than before"),
        (lambda tree: tree.update(x=tree["x"].clone()), "the arguments hold other leaves than before"),
        (lambda tree: tree.pop("n"), "the arguments hold other leaves than before"),
        (draw_and_return, "torch's global random state moved; draw from a Key that is passed in"),
        (lambda tree: torch.manual_seed(3), "torch's global random state moved"),
    ],
)
def test_impure_function_is_caught(f: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^assert_pure: {message}"):
        assert_pure(f, {"x": torch.ones(2, requires_grad=True), "n": 3})


def test_a_gradient_that_was_there_may_not_change() -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    with pytest.raises(AssertionError, match=r"args\[0\].grad is not what it was"):
        assert_pure(lambda x: x.grad.mul_(2), x)


def test_minus_zero_is_another_bit_and_nan_is_equal_to_itself() -> None:
    x = torch.tensor([0.0, math.nan])
    assert_pure(lambda x: x + 1, x)
    with pytest.raises(AssertionError, match="other bits"):
        assert_pure(lambda x: x.numpy().__setitem__(0, -0.0), x)


def test_keyword_arguments_are_named() -> None:
    with pytest.raises(AssertionError, match=r"batch.tokens was written to in place"):
        assert_pure(lambda *, batch: batch.tokens.add_(1), batch=fstep.make_docs([[1]]))
