"""Each function against plain arithmetic, each transpose against the law, on axes of 1 to 4 ranks, in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fstep
from fstep import Axis, Mesh
from tests.mesh.cases import CASES, CHECKS, SHAPE, Case, check_law, inputs, rand, value_and_transpose

FUNCTIONS: dict[str, Callable[[Any, Axis], Any]] = {
    "psum": lambda x, a: fstep.psum(x, axis=a),
    "pvary": lambda x, a: fstep.pvary(x, axis=a),
    "as_partial": lambda x, a: fstep.as_partial(x, axis=a),
    "pmax": lambda x, a: fstep.pmax(x, axis=a),
    "all_gather": lambda x, a: fstep.all_gather(x, axis=a, grad="sum"),
    "reduce_scatter": lambda x, a: fstep.reduce_scatter(x, axis=a),
    "take_shard": lambda x, a: fstep.take_shard(x, axis=a),
    "all_to_all": lambda x, a: fstep.all_to_all(x, axis=a, split_dim=0, concat_dim=0),
    "ppermute": lambda x, a: fstep.ppermute(x, 1, axis=a),
    "broadcast": lambda x, a: fstep.broadcast(x, axis=a, src=0, grad="sum"),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_transpose(case: Case, size: int) -> None:
    if size < case.min_size:
        with pytest.raises(ValueError, match="to is"):
            case.f(rand(0), Axis("dp", size))
        return
    if case.name.startswith("all_gather") and size > 1:  # what can be gathered is what take_shard leaves
        assert case.oracle(inputs(case, size))[0].numel() == size * rand(0).numel()
    check_law(case, fstep.simulate(lambda mesh: value_and_transpose(case, mesh.dp), dp=size))


@pytest.mark.parametrize("case", [c for c in CASES if c.min_size == 1 and not c.partial_out], ids=lambda case: case.name)
def test_second_order_is_the_function_again(case: Case) -> None:
    """f is linear, so differentiating <f(x)^2, 1> twice along v gives 2 fT(f(v)); f(v) comes from the oracle."""
    size = 3

    def second(mesh: Mesh) -> torch.Tensor:
        r = mesh.dp.rank
        x = inputs(case, size)[r].requires_grad_()
        v = rand(0 if case.replicated_in else r, 3)
        out = case.f(x, mesh.dp)
        (g,) = torch.autograd.grad(out, x, 2 * out, create_graph=True)
        assert g.requires_grad
        (h,) = torch.autograd.grad(g, x, v)  # the Hessian 2 fT f, applied to v
        return h

    vs = [rand(0 if case.replicated_in else r, 3) for r in range(size)]
    out_v = case.oracle(vs)

    def expected(mesh: Mesh) -> torch.Tensor:
        x = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
        (h,) = torch.autograd.grad(case.f(x, mesh.dp), x, 2 * out_v[mesh.dp.rank])
        return h

    for got, want in zip(fstep.simulate(second, dp=size), fstep.simulate(expected, dp=size), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_as_partial_and_psum_are_the_identity_to_the_bit(size: int) -> None:
    """A cube computed alike by all ranks counts once: 3 x^2 and then 6 x, at x = 0.1, on every rank."""

    def f(mesh: Mesh) -> list[float]:
        x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        y = fstep.psum(fstep.as_partial(x**3, axis=mesh.cp), axis=mesh.cp)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
        whole = fstep.Ratio(torch.tensor(0.1), torch.tensor(7))  # int stays int
        again = fstep.psum(fstep.as_partial(whole, axis=mesh.cp), axis=mesh.cp)
        assert torch.equal(again.num, whole.num) and again.den.dtype == torch.int64 and int(again.den) == 7
        return [float(v.detach()) for v in (y, first, second)]

    alone = fstep.simulate(f)[0]
    assert alone == pytest.approx([1e-3, 0.03, 0.6], rel=1e-15)
    assert fstep.simulate(f, cp=size) == [alone] * size


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_check(check: Callable[[Mesh], None]) -> None:
    fstep.simulate(check, pp=2, tp=2)


@functions
def test_size_one_is_the_identity(name: str) -> None:
    x = torch.randn(4, 4, requires_grad=name != "pmax")
    assert FUNCTIONS[name](x, Mesh().cp) is x
    tree = {"x": x, "y": None}
    assert FUNCTIONS[name](tree, Mesh().cp) is tree


@functions
def test_maps_over_trees(name: str) -> None:
    def f(mesh: Mesh) -> tuple[Any, Any]:
        x, y = rand(mesh.dp.rank), rand(mesh.dp.rank, 1)
        tree = FUNCTIONS[name]({"x": x, "z": (y, None)}, mesh.dp)
        return tree, {"x": FUNCTIONS[name](x, mesh.dp), "z": (FUNCTIONS[name](y, mesh.dp), None)}

    for got, want in fstep.simulate(f, dp=2):
        assert got["z"][1] is None and torch.equal(got["x"], want["x"]) and torch.equal(got["z"][0], want["z"][0])


@functions
def test_arguments_are_not_changed(name: str) -> None:
    from fstep.testing import assert_pure

    fstep.simulate(lambda mesh: fstep.psum(torch.zeros(1), axis=mesh.dp), dp=2)
    x = [rand(0), rand(1)]
    assert_pure(lambda x: fstep.simulate(lambda mesh: FUNCTIONS[name](x[mesh.rank], mesh.dp), dp=2), x)


@functions
def test_refuses_what_is_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: x holds a float; pass a tensor or a tree of tensors"):
        FUNCTIONS[name]({"a": 1.0}, Mesh().dp)


@functions
def test_refuses_an_axis_without_transport(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: axis 'dp' has 2 ranks and no transport .* take the mesh from simulate"):
        FUNCTIONS[name](torch.ones(2, 2), Axis("dp", 2))


@pytest.mark.parametrize("name", ["psum", "pmax", "reduce_scatter", "as_partial"])
def test_refuses_to_add_bools(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: x is bool; convert it to a number first, x.to\(torch.int64\)"):
        FUNCTIONS[name](torch.ones(2, dtype=torch.bool), Mesh().dp)


@pytest.mark.parametrize("name", ["reduce_scatter", "take_shard", "all_to_all"])
def test_refuses_what_does_not_divide(name: str) -> None:
    message = rf"{name}: dim 0 has 10 elements, which do not divide over axis 'tp' of size 4; pad it by 2"
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](torch.ones(10, 4), Axis("tp", 4))


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "take_shard", "all_to_all"])
def test_refuses_a_dim_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: there is no dim 0 in shape \(\); give x that dimension"):
        FUNCTIONS[name](torch.ones(()), Mesh().dp)


@pytest.mark.parametrize("axis", [Axis("dp"), Axis("dp", 2)])
def test_grad_has_to_be_stated(axis: Axis) -> None:
    message = r'grad is None; pass "sum" if the loss is a partial sum over the axis, "slice" if every rank computes'
    with pytest.raises(ValueError, match=f"all_gather: {message}"):
        fstep.all_gather(torch.ones(2), axis=axis, grad=None)
    with pytest.raises(ValueError, match=f"broadcast: {message}"):
        fstep.broadcast(torch.ones(2), axis=axis, src=0, grad=None)
    with pytest.raises(TypeError, match="grad"):
        fstep.all_gather(torch.ones(2), axis=axis)


def test_refuses_wrong_ranks() -> None:
    axis = Axis("cp", 3)
    with pytest.raises(ValueError, match="broadcast: src is 3, and axis 'cp' has ranks 0 to 2"):
        fstep.broadcast(torch.ones(1), axis=axis, src=3, grad="sum")
    with pytest.raises(ValueError, match=r"ppermute: to is \[0, 0, 1\]; pass for each of the 3 ranks of axis 'cp'"):
        fstep.ppermute(torch.ones(1), [0, 0, 1], axis=axis)


def test_pmax_has_no_gradient() -> None:
    def f(mesh: Mesh) -> None:
        x = torch.ones(1, requires_grad=True)
        with torch.no_grad():
            assert fstep.pmax(x, axis=mesh.dp).tolist() == [1.0]
        with pytest.raises(ValueError, match=r"pmax: x requires a gradient, .* pass x.detach\(\)"):
            fstep.pmax(x, axis=mesh.dp)

    fstep.simulate(f, dp=2)


def test_pmax_of_nan_is_nan_everywhere() -> None:
    f = lambda mesh: fstep.pmax(torch.tensor([float("nan"), -1.0][mesh.dp.rank]), axis=mesh.dp)  # noqa: E731
    assert all(x.isnan() for x in fstep.simulate(f, dp=2))


def test_nothing_is_recorded_without_a_gradient() -> None:
    def f(mesh: Mesh) -> None:
        # Under no_grad it does not matter to others whether x would require a gradient.
        x = torch.ones(2, requires_grad=mesh.dp.rank == 0)
        with torch.no_grad():
            for name, g in FUNCTIONS.items():
                assert not g(x, mesh.dp).requires_grad, name
        assert not fstep.psum(torch.ones(2), axis=mesh.dp).requires_grad

    fstep.simulate(f, dp=2)


@pytest.mark.parametrize("case", [c for c in CASES if c.min_size == 1], ids=lambda case: case.name)
def test_gradients_compose_with_value_and_grad_and_remat(case: Case) -> None:
    def f(mesh: Mesh) -> float:
        loss = lambda x: case.f(x, mesh.tp).pow(3).sum()  # noqa: E731
        x = inputs(case, 2)[mesh.tp.rank]
        again = fstep.remat(loss)
        (value, g), (value2, g2) = fstep.value_and_grad(loss)(x), fstep.value_and_grad(again)(x)
        assert torch.equal(g, g2) and torch.equal(value, value2)
        return float(g.norm())

    assert sum(fstep.simulate(f, tp=2)) > 0


def test_two_by_two_by_two() -> None:
    """Sums over each axis alone, and over two at once, by hand: rank = 4 pp + 2 dp + cp."""

    def f(mesh: Mesh) -> list[int]:
        x = torch.tensor(mesh.rank)
        axes = [mesh.pp, mesh.dp, mesh.cp, mesh.over("dp", "cp"), mesh.over("cp", "pp"), mesh.over("pp", "dp", "cp")]
        return [int(fstep.psum(x, axis=axis)) for axis in axes]

    want = []
    for rank in range(8):
        pp, dp, cp = rank // 4, rank // 2 % 2, rank % 2
        over_pp, over_dp, over_cp = 4 + 2 * (2 * dp + cp), 2 + 2 * (4 * pp + cp), 1 + 2 * (4 * pp + 2 * dp)
        want.append([over_pp, over_dp, over_cp, 16 * pp + 6, 8 * dp + 10, 28])
    assert fstep.simulate(f, pp=2, dp=2, cp=2) == want


def test_same_bits_every_time() -> None:
    def f(mesh: Mesh) -> torch.Tensor:
        x = rand(mesh.rank).requires_grad_()
        y = fstep.psum(
            (fstep.all_gather(x, axis=mesh.cp, grad="sum") * rand(mesh.rank, 5, shape=(24, 2, 24))).sum(0), axis=mesh.dp
        )
        return torch.autograd.grad(y.sin().sum(), x)[0]

    first = fstep.simulate(f, dp=3, cp=2)
    for _ in range(5):
        assert all(map(torch.equal, fstep.simulate(f, dp=3, cp=2), first))
