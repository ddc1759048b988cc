"""finalize_grads on a mesh, by hand: what is summed over what, and each parameter measured once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Copied, Mesh, Ratio, Shard, finalize_grads
from fstep.testing import assert_pure

F64 = torch.float64


def value(seed: int, *shape: int) -> Tensor:
    return fstep.Key.seed(seed).normal(shape, dtype=F64)


def part_of(mesh: Mesh, seed: int, *shape: int) -> Tensor:
    """This rank's addend: it depends on where the rank is on dp and cp, as a gradient of its own tokens does."""
    return value(seed + 1000 * (1 + mesh.dp.rank * 10 + mesh.cp.rank), *shape)


def total_of(sizes: dict[str, int], seed: int, *shape: int) -> Tensor:
    dp, cp = sizes.get("dp", 1), sizes.get("cp", 1)
    return sum(
        (value(seed + 1000 * (1 + d * 10 + c), *shape) for d in range(dp) for c in range(cp)), torch.zeros(shape, dtype=F64)
    )


def ratio(mesh: Mesh, seed: int = 7) -> Ratio:
    return Ratio(part_of(mesh, seed).squeeze(), part_of(mesh, seed + 1).abs().squeeze())


def gradients(mesh: Mesh) -> dict[str, Any]:
    """An embedding that first and last stage hold, cut over tp; a norm that tp ranks share; a matrix cut over tp."""
    last = mesh.pp.size - 1
    q = Shard.cut(part_of(mesh, 20 + mesh.pp.rank, 6, 3), axis=mesh.tp, dim=0)
    grads: dict[str, Any] = {"layers": {mesh.pp.rank: {"q": q, "norm": part_of(mesh, 40 + mesh.pp.rank, 5), "frozen": None}}}
    if mesh.pp.rank in (0, last):
        embed = Shard.cut(part_of(mesh, 60 + mesh.pp.rank, 7, 2), axis=mesh.tp, dim=0)
        grads["embed"] = embed if last == 0 else Copied(embed, mesh.pp, (0, last))
    return grads


def by_hand(sizes: dict[str, int]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Whole summed gradients, the sum of the loss, its weight."""
    pp = sizes.get("pp", 1)
    out = {f"layers.{p}.q": total_of(sizes, 20 + p, 6, 3) for p in range(pp)}
    out |= {f"layers.{p}.norm": total_of(sizes, 40 + p, 5) for p in range(pp)}
    out["embed"] = sum((total_of(sizes, 60 + p, 7, 2) for p in {0, pp - 1}), torch.zeros(7, 2, dtype=F64))
    dp, cp = sizes.get("dp", 1), sizes.get("cp", 1)
    at = [1000 * (1 + d * 10 + c) for d in range(dp) for c in range(cp)]
    num = torch.stack([value(7 + s).squeeze() for s in at]).sum()
    den = torch.stack([value(8 + s).abs().squeeze() for s in at]).sum()
    return out, num, den


MESHES: list[dict[str, int]] = [
    {"dp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}, {"pp": 3}, {"dp": 2, "cp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 2},
    {"pp": 2, "dp": 2, "cp": 2}, {"pp": 2, "dp": 2, "tp": 2}, {"cp": 3, "tp": 2},
]  # fmt: skip


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_sums_means_and_norm(sizes: dict[str, int], max_norm: float | None) -> None:
    want, num, den = by_hand(sizes)
    norm = math.sqrt(sum(float((g / den).square().sum()) for g in want.values()))
    scale = 1 / float(den) * (1 if max_norm is None else min(1, max_norm / (norm + 1e-6)))

    def run(mesh: Mesh) -> Any:
        return assert_pure(finalize_grads, gradients(mesh), ratio(mesh), mesh=mesh, max_norm=max_norm)

    seen = dict.fromkeys(want, 0)
    for grads, metrics in fstep.simulate(run, **sizes):
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-12)
        assert float(metrics["loss"]) == pytest.approx(float(num / den), rel=1e-12)
        assert float(metrics["weight"]) == pytest.approx(float(den), rel=1e-12)
        for place, got in zip(fstep.places(grads), fstep.tree_leaves(grads), strict=True):
            box = tuple(slice(a, b) for a, b in place.box)
            torch.testing.assert_close(got, want[place.path][box] * scale, rtol=1e-12, atol=1e-15)
            seen[place.path] += got.numel()
    assert all(seen.values())


def test_copies_stay_the_same_to_the_bit() -> None:
    results = fstep.simulate(lambda mesh: finalize_grads(gradients(mesh), ratio(mesh), mesh=mesh, max_norm=0.5), pp=3, dp=2)
    embeds = [grads["embed"].value for grads, _ in results if "embed" in grads]
    assert len(embeds) == 4 and all(torch.equal(embeds[0], e) for e in embeds)
    norms = [metrics["grad_norm"] for _, metrics in results]
    assert all(torch.equal(norms[0], n) for n in norms)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2}, {"cp": 2}, {"dp": 2, "pp": 2, "tp": 2}], ids=str)
def test_all_ranks_agree_that_one_has_a_gradient_that_is_not_finite(sizes: dict[str, int], bad: float) -> None:
    def run(mesh: Mesh) -> Any:
        grads = gradients(mesh)
        if mesh.rank == mesh.size - 1:
            grads["layers"][mesh.pp.rank]["q"] = fstep.tree_map(lambda x: x * bad, grads["layers"][mesh.pp.rank]["q"])
        return finalize_grads(grads, ratio(mesh), mesh=mesh, max_norm=1.0)

    for grads, metrics in fstep.simulate(run, **sizes):
        assert float(metrics["nonfinite"]) == 1
        assert all(bool(g.isnan().all()) for g in fstep.tree_leaves(grads))


def test_nothing_to_learn_anywhere() -> None:
    zero = Ratio(torch.zeros((), dtype=F64), torch.zeros((), dtype=F64))

    def run(mesh: Mesh) -> Any:
        grads = fstep.tree_map(torch.zeros_like, gradients(mesh))
        return finalize_grads(grads, zero, mesh=mesh, max_norm=1.0)

    for grads, metrics in fstep.simulate(run, pp=2, cp=2):
        assert float(metrics["nonfinite"]) == float(metrics["grad_norm"]) == float(metrics["loss"]) == 0
        assert not any(g.any() for g in fstep.tree_leaves(grads))


def test_copies_meet_by_name_whatever_the_order_of_a_ranks_stages() -> None:
    def run(mesh: Mesh) -> Any:
        def copy(x: float) -> Copied:
            return Copied(torch.full((2,), x, dtype=F64), mesh.pp, (0, 1))

        a, b = {"a": copy(1.0 + mesh.pp.rank)}, {"b": copy(10.0 + 10 * mesh.pp.rank)}
        grads = fstep.Stages({0: a, 3: b} if mesh.pp.rank == 0 else {1: b, 2: a})
        one = torch.ones((), dtype=F64)
        out = finalize_grads(grads, Ratio(one, one), mesh=mesh)[0]
        return dict(zip(fstep.tree_paths(out), [x.tolist() for x in fstep.tree_leaves(out)], strict=True))

    assert fstep.simulate(run, pp=2) == [{"a": [3.0, 3.0], "b": [30.0, 30.0]}] * 2


@pytest.mark.parametrize("what", ["gradients", "metrics"])
def test_ranks_that_mean_different_leaves_find_out(what: str) -> None:
    def run(mesh: Mesh) -> Any:
        one = torch.ones((), dtype=F64)
        mine = "aa" if mesh.rank else "bb"
        grads = {mine if what == "gradients" else "w": one, "z": one}
        return finalize_grads(grads, (Ratio(one, one), {mine if what == "metrics" else "m": Ratio(one, one)}), mesh=mesh)

    with pytest.raises(fstep.MeshError, match=r"calls psum of .*(aa|bb).* and rank . .* calls psum of .*(aa|bb)"):
        fstep.simulate(run, dp=2)


def test_stages_of_different_dtypes_agree_on_the_norm() -> None:
    def run(mesh: Mesh) -> Any:
        grads = {"w": torch.full((3,), 1.1, dtype=F64 if mesh.pp.rank else torch.float32)}
        one = torch.ones((), dtype=torch.float32)
        return finalize_grads(grads, Ratio(one, 3 * one), mesh=mesh, max_norm=0.1)[1]["grad_norm"]

    first, second = fstep.simulate(run, pp=2)
    assert first.dtype == second.dtype == torch.float32 and torch.equal(first, second)


def test_what_needs_no_sum_is_the_callers_and_stays_as_it_was() -> None:
    """ZeRO pieces arrive summed, and a shard of tp needs no sum on a mesh of tp: neither may be scaled in place."""

    def run(mesh: Mesh) -> Any:
        pieces = fstep.shard_params({"w": torch.full((6,), 3.0, dtype=F64)}, mesh.over("dp", "cp"))
        q = Shard.cut(torch.full((4, 3), 5.0, dtype=F64), axis=mesh.tp, dim=0)
        return assert_pure(finalize_grads, {"p": pieces, "q": q}, ratio(mesh), mesh=mesh)[0]

    for sizes in ({"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2}):
        fstep.simulate(run, **sizes)


def test_a_frozen_stage_takes_part() -> None:
    def run(mesh: Mesh) -> Any:
        grads = {"w": torch.full((4,), 3.0, dtype=F64) if mesh.pp.rank else None}
        one = torch.ones((), dtype=F64)
        return finalize_grads(grads, Ratio(one, 2 * one), mesh=mesh, max_norm=1.5)

    (first, m0), (second, m1) = fstep.simulate(run, pp=2)
    assert first == {"w": None} and float(m0["grad_norm"]) == float(m1["grad_norm"]) == 3.0
    torch.testing.assert_close(second["w"], torch.full((4,), 0.75, dtype=F64), rtol=1e-6, atol=0)


def test_many_small_leaves_are_summed_in_few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of one dtype go together, whatever their shapes; a bucket too small for two sends each alone."""
    from fstep.update import reduce

    def run(mesh: Mesh) -> Any:
        grads = {
            str(i): torch.full((i, 2), float(mesh.rank + i), dtype=F64 if i % 3 else torch.float32) for i in range(1, 12)
        }
        one = torch.ones((), dtype=F64)
        return finalize_grads(grads, Ratio(one, one), mesh=mesh)[0]

    want = fstep.simulate(run, dp=2)[0]
    calls: list[int] = []
    real = reduce.psum

    def counting(x: Any, axis: Any, title: str) -> Any:
        calls.append(x.numel())
        return real(x, axis, title)

    monkeypatch.setattr(reduce, "psum", counting)
    fstep.simulate(run, dp=2)
    assert len(calls) == 2 * 3  # on each rank: float32, float64, and the norm
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 1)
    calls.clear()
    got = fstep.simulate(run, dp=2)[1]
    assert len(calls) == 2 * 12
    for a, b in zip(fstep.tree_leaves(got), fstep.tree_leaves(want), strict=True):
        assert torch.equal(a, b) and a.shape == b.shape
    assert float(want["4"][0, 0]) == (4 + 5) / 2


@pytest.mark.parametrize("mutant", ["twice", "mean", "sign", "no tie", "copy counted twice", "shard counted once"])
def test_mutants_die(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fstep.update import finalize, reduce

    real, real_counted = reduce.psum, finalize.counted
    if mutant in ("twice", "mean", "sign"):
        factor = {"twice": 2.0, "mean": 0.5, "sign": -1.0}[mutant]
        monkeypatch.setattr(reduce, "psum", lambda x, axis, title: real(x, axis, title) * (factor if x.dim() else 1))
    if mutant == "no tie":
        monkeypatch.setattr(reduce, "_sum_copies", lambda x, copies: x)
    if mutant == "copy counted twice":
        monkeypatch.setattr(fstep.Place, "counts", True)
    if mutant == "shard counted once":
        monkeypatch.setattr(finalize, "counted", lambda g, p, mesh: real_counted(g, p, mesh) if mesh.tp.rank == 0 else [])
    with pytest.raises(AssertionError):
        test_sums_means_and_norm({"pp": 2, "dp": 2, "tp": 2}, None)
