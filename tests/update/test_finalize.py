"""finalize_grads beside torch's clip_grad_norm_ on the mean, its guards, and what it must not do to its arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fstep.mesh.axis import Axis, Mesh
from fstep.ratio import Ratio
from fstep.tree import tree_leaves, tree_map
from fstep.update.finalize import finalize_grads
from tests.update.cases import assert_close, bits, make_grads, make_params, randn, versions

MESH = Mesh()


def ratio(num: float, den: float, device: str = "cpu") -> Ratio:
    return Ratio(torch.tensor(num, device=device), torch.tensor(den, device=device))


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
def test_equals_torch_clip_of_the_mean(device: str, max_norm: float | None, mode: str) -> None:
    grads = make_grads(make_params(device=device), 0)
    oracle = [torch.nn.Parameter(g) for g in tree_leaves(grads)]
    for p in oracle:
        p.grad = p.detach() / 8.0
    norm = torch.nn.utils.clip_grad_norm_(oracle, math.inf if max_norm is None else max_norm)
    if mode == "recording":
        grads = tree_map(lambda g: g.requires_grad_(), grads)
    out, metrics = finalize_grads(grads, ratio(12.0, 8.0, device), mesh=MESH, max_norm=max_norm, donate=mode == "donate")
    assert_close(out, [p.grad for p in oracle])
    assert_close(metrics["grad_norm"], norm)
    assert {k: float(v) for k, v in metrics.items() if k != "grad_norm"} == {
        "loss": 1.5,
        "weight": 8.0,
        "nonfinite": 0.0,
    }
    assert all(v.ndim == 0 for v in metrics.values())
    assert list(metrics) == ["loss", "weight", "grad_norm", "nonfinite"]


def test_by_hand() -> None:
    # Sum (12, 0), (0, 16) of weight 4: mean (3, 0), (0, 4), norm 5; to norm 1 that is a fifth.
    grads = {"a": torch.tensor([12.0, 0.0]), "b": None, "c": torch.tensor([0.0, 16.0])}
    out, metrics = finalize_grads(grads, ratio(0.0, 4.0), mesh=MESH, max_norm=1.0)
    assert out["b"] is None
    assert torch.allclose(out["a"], torch.tensor([0.6, 0.0]), rtol=1e-6)
    assert torch.allclose(out["c"], torch.tensor([0.0, 0.8]), rtol=1e-6)
    assert metrics["grad_norm"] == 5.0


def test_microbatches_do_not_matter() -> None:
    # Two microbatches of weight 3 and 5 added up are one of weight 8.
    first, second = (make_grads(make_params(), i) for i in (1, 2))
    total = tree_map(torch.add, first, second)
    loss = ratio(3.0, 3.0) + ratio(10.0, 5.0)
    out, metrics = finalize_grads(total, loss, mesh=MESH)
    assert_close(out, tree_map(lambda a, b: a / 8 + b / 8, first, second))
    assert metrics["loss"] == 13 / 8


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_no_weight_gives_zeros(device: str, recording: bool, max_norm: float | None) -> None:
    for make in (torch.zeros_like, torch.ones_like):
        grads = tree_map(lambda p, make=make: make(p).requires_grad_(recording), make_params(device=device))
        out, metrics = finalize_grads(grads, ratio(3.0, 0.0, device), mesh=MESH, max_norm=max_norm)
        assert all((g == 0).all() for g in tree_leaves(out))
        assert {k: float(v.detach()) for k, v in metrics.items()} == {
            "loss": 0.0,
            "weight": 0.0,
            "grad_norm": 0.0,
            "nonfinite": 0.0,
        }


@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
@pytest.mark.parametrize("den", [0.0, 2.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_or_all_nan(device: str, value: float, den: float, mode: str) -> None:
    grads = make_grads(make_params(device=device), 0)
    grads["layers"][0]["norm"][2] = value
    if mode == "recording":
        grads = tree_map(lambda g: g.requires_grad_(), grads)
    out, metrics = finalize_grads(grads, ratio(1.0, den, device), mesh=MESH, max_norm=1.0, donate=mode == "donate")
    assert all(g.isnan().all() for g in tree_leaves(out))
    assert metrics["nonfinite"] == 1
    assert not metrics["grad_norm"].isfinite()


def test_a_mean_that_overflows_is_nan_everywhere() -> None:
    grads = {"a": torch.tensor([1e30]), "b": torch.tensor([1.0])}
    out, metrics = finalize_grads(grads, ratio(1.0, 1e-10), mesh=MESH)
    assert all(g.isnan().all() for g in tree_leaves(out))
    assert metrics["nonfinite"] == 1


def test_weight_that_is_not_finite_gives_nan() -> None:
    out, metrics = finalize_grads({"a": torch.ones(2)}, ratio(1.0, float("nan")), mesh=MESH)
    assert out["a"].isnan().all()
    assert metrics["nonfinite"] == 1


@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_leaf_keeps_its_dtype_and_its_digits(device: str, dtype: torch.dtype, mode: str) -> None:
    # 1/den is 3e-6, where float16 has only 50 numbers left; the product is rounded once all the same.
    g, other = randn(0, 50, dtype=dtype, device=device) * 300, randn(1, 20, dtype=torch.float32, device=device) * 300
    expected, expected_other = g.double() / 3e5, other.double() / 3e5
    loss = Ratio(torch.tensor(1.0, device=device), torch.tensor(3e5, device=device))
    norm = torch.cat([expected, expected_other]).norm()
    grads = tree_map(lambda x: x.requires_grad_(mode == "recording"), {"a": g, "b": other})
    out, metrics = tree_map(torch.Tensor.detach, finalize_grads(grads, loss, mesh=MESH, donate=mode == "donate"))
    assert out["a"].dtype == dtype
    assert out["b"].dtype == torch.float32
    assert metrics["grad_norm"].dtype == torch.promote_types(dtype, torch.float32)
    # float32 scale, then one rounding (which is absolute where float16 becomes subnormal)
    info = torch.finfo(dtype)
    bound = expected.abs() * max(info.eps, 2e-7 if dtype != torch.float64 else 1e-15) + info.smallest_normal * info.eps
    assert ((out["a"].double() - expected).abs() <= bound).all()
    assert_close(out["b"].double(), expected_other, 3e-7)
    assert_close(metrics["grad_norm"].double(), norm, 3e-7)


def test_norm_of_many_small_16_bit_numbers() -> None:
    # In bfloat16 itself a sum of squares stops growing at 256.
    grads = {"a": torch.full((4096,), 1.0, dtype=torch.bfloat16)}
    _, metrics = finalize_grads(grads, ratio(1.0, 1.0), mesh=MESH)
    assert metrics["grad_norm"] == 64.0


def test_pure(device: str) -> None:
    grads = make_grads(make_params(device=device), 0)
    loss = ratio(1.0, 3.0, device), {"aux": ratio(1.0, 2.0, device)}
    before = bits((grads, loss)), versions((grads, loss))
    out, _ = finalize_grads(grads, loss, mesh=MESH, max_norm=1.0)
    assert (bits((grads, loss)), versions((grads, loss))) == before
    assert not {g.data_ptr() for g in tree_leaves(grads)} & {g.data_ptr() for g in tree_leaves(out)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_donation_reuses_memory(device: str, dtype: torch.dtype) -> None:
    grads = make_grads(make_params(dtype, device), 0)
    expected, _ = finalize_grads(grads, ratio(1.0, 3.0, device), mesh=MESH, max_norm=1.0)
    memory = [g.data_ptr() for g in tree_leaves(grads)]
    out, _ = finalize_grads(grads, ratio(1.0, 3.0, device), mesh=MESH, max_norm=1.0, donate=True)
    assert bits(out) == bits(expected)
    assert [g.data_ptr() for g in tree_leaves(out)] == memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_donation_of_gradients_that_share_memory(dtype: torch.dtype) -> None:
    # autograd returns one tensor for both terms of a sum, and an expanded one for what was summed up.
    a, b, c = (torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(3))
    ga, gb, gc = torch.autograd.grad(((a + b) ** 2).sum() + c.sum(), [a, b, c])
    assert ga.data_ptr() == gb.data_ptr()
    assert gc.stride() == (0,)
    out, _ = finalize_grads({"a": ga, "b": gb, "c": gc}, ratio(1.0, 4.0), mesh=MESH, donate=True)
    assert out["a"].tolist() == out["b"].tolist() == [1.0, 1.0, 1.0]
    assert out["c"].tolist() == [0.25, 0.25, 0.25]


def test_donation_of_gradients_that_overlap() -> None:
    """The gradient of what was put behind something is a view into the middle of that of the whole."""
    b, c, x = (torch.tensor(v, requires_grad=True) for v in ([3.0, 4.0], [1.0, 1.0, 1.0], [1.0]))
    gb, gc = torch.autograd.grad(((torch.cat([x, b]) + c) ** 2).sum(), [b, c])
    assert gb.data_ptr() == gc.data_ptr() + 4
    given = {"b": gb, "c": gc, "d": torch.ones(2)}
    expected, _ = finalize_grads(given, ratio(1.0, 2.0), mesh=MESH)
    assert expected["b"].tolist() == [4.0, 5.0]
    out, _ = finalize_grads(given, ratio(1.0, 2.0), mesh=MESH, donate=True)
    assert bits(out) == bits(expected)
    assert out["d"] is given["d"]


def test_nothing_waits_for_the_device(device: str, no_waiting: Any) -> None:
    grads = make_grads(make_params(torch.float32, device), 0)
    loss = ratio(1.0, 3.0, device), {"aux": ratio(1.0, 2.0, device)}
    finalize_grads(grads, loss, mesh=MESH, max_norm=1.0)  # the first call may prepare the kernels
    with no_waiting():
        finalize_grads(grads, loss, mesh=MESH, max_norm=1.0)
        finalize_grads(grads, loss, mesh=MESH, max_norm=1.0, donate=True)


def test_vmap_is_a_loop() -> None:
    params = make_params()
    grads = [make_grads(params, i) for i in range(3)]
    grads[2]["embed"][0, 0] = float("nan")
    dens = torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)

    def f(g: Any, den: torch.Tensor) -> Any:
        return finalize_grads(g, Ratio(den * 2, den), mesh=MESH, max_norm=0.5)

    out, metrics = torch.func.vmap(f)(tree_map(lambda *gs: torch.stack(gs), *grads), dens)
    for i in range(3):
        expected, expected_metrics = f(grads[i], dens[i])
        assert metrics["nonfinite"][i] == expected_metrics["nonfinite"] == float(i == 2)
        if i < 2:
            assert_close(tree_map(lambda x, i=i: x[i], (out, metrics)), (expected, expected_metrics))
    assert all(g[2].isnan().all() for g in tree_leaves(out))


def test_derivatives_are_those_of_the_formula() -> None:
    # Through the clip and through the denominator, and twice, which needs a norm that is smooth at a leaf of zeros.
    a, b = randn(0, 3).requires_grad_(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    num, den = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 3.0))

    def f(a: torch.Tensor, b: torch.Tensor, num: torch.Tensor, den: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, metrics = finalize_grads({"a": a, "b": b}, Ratio(num, den), mesh=MESH, max_norm=0.1)
        return out["a"], out["b"], metrics["loss"], metrics["grad_norm"]

    assert torch.autograd.gradcheck(f, (a, b, num, den))
    assert torch.autograd.gradgradcheck(f, (a, b, num, den))


def test_derivative_with_no_weight_is_finite() -> None:
    g = torch.zeros(3, requires_grad=True)
    out, metrics = finalize_grads({"a": g}, ratio(1.0, 0.0), mesh=MESH, max_norm=1.0)
    (d,) = torch.autograd.grad(out["a"].sum() + metrics["grad_norm"], [g])
    assert d.tolist() == [0.0, 0.0, 0.0]


def test_extra_ratios_become_metrics() -> None:
    extra = {"aux": ratio(3.0, 2.0), "clipped": ratio(1.0, 0.0)}
    _, metrics = finalize_grads({"a": torch.ones(1)}, (ratio(1.0, 1.0), extra), mesh=MESH)
    assert (float(metrics["aux"]), float(metrics["clipped"])) == (1.5, 0.0)
    assert list(metrics)[4:] == ["aux", "clipped"]


@pytest.mark.parametrize("donate", [False, True])
def test_16_bit_leaf_without_dimensions(donate: bool) -> None:
    g = torch.tensor(8.0, dtype=torch.bfloat16)
    out, _ = finalize_grads({"a": g}, ratio(1.0, 4.0), mesh=MESH, donate=donate)
    assert (out["a"].shape, out["a"].dtype, float(out["a"])) == ((), torch.bfloat16, 2.0)
    assert float(g) == (2.0 if donate else 8.0)


def test_empty_leaf_and_integer_weight() -> None:
    loss = Ratio(torch.tensor(1.0), torch.tensor(4))
    out, metrics = finalize_grads({"a": torch.ones(0, 2), "b": torch.full((4,), 8.0)}, loss, mesh=MESH)
    assert out["a"].shape == (0, 2)
    assert out["b"].tolist() == [2.0] * 4
    assert metrics["grad_norm"] == 4.0


GRADS = {"a": torch.ones(2)}


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((GRADS, torch.ones(())), {}, TypeError, r"loss is Tensor; pass Ratio\(sum, weight\)"),
        ((GRADS, (ratio(1, 1), {"aux": 1.0})), {}, TypeError, "aux is float; pass Ratio"),
        ((GRADS, (ratio(1, 1), [ratio(1, 1)])), {}, TypeError, r"loss\[1\] is list; pass a dict"),
        ((GRADS, Ratio(torch.ones(2), torch.ones(()))), {}, TypeError, r"loss is a Ratio of \(2,\)"),
        ((GRADS, Ratio(torch.ones(()), 3)), {}, TypeError, "loss is a Ratio of 3; sum to 0-d tensors"),
        ((GRADS, (ratio(1, 1), {"grad_norm": ratio(1, 1)})), {}, ValueError, "a ratio is named 'grad_norm'"),
        ((GRADS, ratio(1, 1)), {"max_norm": 0.0}, ValueError, "max_norm is 0.0; pass a number > 0"),
        ((GRADS, ratio(1, 1)), {"max_norm": float("nan")}, ValueError, "max_norm is nan"),
        (({"a": None}, ratio(1, 1)), {}, ValueError, "grads has no leaves"),
        (({"a": torch.arange(2)}, ratio(1, 1)), {}, TypeError, "the gradient 'a' is torch.int64"),
        (({"a": 1.0}, ratio(1, 1)), {}, TypeError, "the gradient 'a' is float"),
        (({"a": torch.ones(1, requires_grad=True)}, ratio(1, 1)), {"donate": True}, ValueError, "donate=True while"),
    ],
)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^finalize_grads: {message}"):
        finalize_grads(*args, mesh=MESH, **kwargs)


def test_an_axis_it_knows_nothing_of_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="finalize_grads: axis 'ep' has size 2"):
        finalize_grads(GRADS, ratio(1, 1), mesh=Mesh(ep=Axis("ep", 2)))
