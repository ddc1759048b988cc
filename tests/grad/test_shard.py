"""ZeRO: pieces that are the params, moves that are each other's transposes, steps with the bits of plain data parallel."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import AdamW, Axis, Copied, Key, Mesh, Pieces, Shard, Stages, Tied
from tests.grad.zero_cases import (
    assert_same_bits,
    block,
    data_axis,
    loss_fn,
    make_params,
    run_steps,
    stage,
    tokens,
    with_diary,
)

SIZES = [{"dp": 2}, {"dp": 3}, {"dp": 4}, {"dp": 2, "cp": 2}]
on_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " ".join(f"{k}{n}" for k, n in sizes.items()))


def sharded(mesh: Mesh, **options: Any) -> Any:
    return fstep.shard_params(make_params(), data_axis(mesh), **options)


def zero(mesh: Mesh, **options: Any) -> Any:
    """What `run_steps` takes to cut its params."""
    return lambda params: fstep.shard_params(params, data_axis(mesh), **options)


# What the pieces are -------------------------------------------------------------------------------------------------


@on_sizes
def test_pieces_are_the_params_cut_in_equal_parts(sizes: dict[str, int]) -> None:
    params, ranks = make_params(), fstep.simulate(sharded, **sizes)
    for rank in ranks:
        assert fstep.tree_paths(rank) == fstep.tree_paths(params)
        assert all(x.dim() == 1 and x.dtype == torch.float64 for x in fstep.tree_leaves(rank))
    for path, whole, *pieces in zip(
        fstep.tree_paths(params), fstep.tree_leaves(params), *map(fstep.tree_leaves, ranks), strict=True
    ):
        assert torch.equal(torch.cat(pieces), whole.flatten()), path
    for node in ranks[0]["layers"].values():
        # 45, 5 and 45 elements begin at 0, 48 and 64 and end at 109: 7 times 16, and every rank has as many times 16.
        assert node.parts == (16 * {2: 4, 3: 3, 4: 2}[len(ranks)],)
        assert len({x.untyped_storage().data_ptr() for x in fstep.tree_leaves(node)}) == 1
    assert {type(ranks[0][name]) for name in ("embed", "head", "norm")} == {Pieces}
    assert [len(rank["norm"].value) for rank in ranks] == [5] + [0] * (len(ranks) - 1)


@on_sizes
def test_places_say_which_elements(sizes: dict[str, int]) -> None:
    params = make_params()
    for rank in fstep.simulate(sharded, **sizes):
        for tree in (rank, fstep.tree_map(lambda x: 2 * x, rank), fstep.adamw.init(rank).mu):
            for place, whole, piece in zip(
                fstep.places(tree), fstep.tree_leaves(params), fstep.tree_leaves(rank), strict=True
            ):
                assert place.shape == tuple(whole.shape) and place.box == tuple((0, n) for n in whole.shape)
                assert [axis.size for axis in place.axes] == [len(fstep.tree_leaves(sizes)) and data_size(sizes)]
                assert torch.equal(place.cut(whole), piece)
        some = fstep.tree_map_with_path(lambda path, x: x if "up" in path else None, rank)
        assert [p.path for p in fstep.places(some)] == [f"layers.{i}.up" for i in range(4)]


def data_size(sizes: dict[str, int]) -> int:
    return sizes["dp"] * sizes.get("cp", 1)


def test_nodes_inside_and_around() -> None:
    """Two slices of a tied embedding, on two stages, each cut further."""
    whole = torch.arange(60.0).view(12, 5)

    def f(mesh: Mesh) -> Any:
        embed = Copied(Shard.cut(whole, axis=mesh.tp, dim=0), mesh.pp, (0, 1))
        params = Stages({mesh.pp.rank: {"embed": embed, "head": Tied("embed"), "none": None, "layers": {}}})
        cut = fstep.shard_params(params, mesh.dp)
        assert isinstance(cut.parts[mesh.pp.rank]["embed"], Pieces)
        (place,) = fstep.places(cut)
        assert place.path == "embed" and place.shape == (12, 5) and place.counts == (mesh.pp.rank == 0)
        assert place.box == ((6 * mesh.tp.rank, 6 * mesh.tp.rank + 6), (0, 5))
        assert [axis.name for axis in place.axes] == ["tp", "dp"]
        assert torch.equal(place.cut(whole), fstep.tree_leaves(cut)[0])
        (slice_,) = fstep.tree_leaves(embed)
        around = Shard(fstep.shard_params(slice_, mesh.dp), mesh.tp, 0, place.box[0], 12)  # the nodes the other way round
        assert fstep.places({"embed": Copied(around, mesh.pp, (0, 1))}) == [place]
        back = fstep.unshard_params(cut)
        assert_same_bits(back, params)
        part = back.parts[mesh.pp.rank]
        assert part["head"] == Tied("embed") and part["none"] is None and isinstance(part["embed"], Copied)
        return fstep.tree_leaves(cut)[0]

    pieces = fstep.simulate(f, pp=2, dp=2, tp=2)
    assert torch.equal(torch.cat([pieces[0], pieces[2], pieces[1], pieces[3]]), whole.flatten())


def test_dtypes_lie_apart_and_scalars_and_nothing_are_cut_too() -> None:
    unit = {
        "a": torch.randn(3, 3),
        "b": torch.randn(40, dtype=torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.randn(()),
        "e": torch.zeros(0, 4),
        "f": torch.randn(2, 3).mT,
    }

    def f(mesh: Mesh) -> Any:
        cut = fstep.shard_params({"unit": unit}, mesh.dp, dtype=torch.float16, units=lambda path: path == "unit")
        node = cut["unit"]
        assert len(node.parts) == 3 and node.parts[1:] == (16, 16)
        got = fstep.gather_params(cut)["unit"]
        kinds = {k: torch.float16 if x.is_floating_point() else x.dtype for k, x in unit.items()}
        for name, x in got.items():
            assert x.dtype == kinds[name] and torch.equal(x, unit[name].to(kinds[name])), name
        return fstep.unshard_params(cut)["unit"]

    for back in fstep.simulate(f, dp=4):
        assert_same_bits(back, unit)
        assert [back[k].dtype for k in unit] == [x.dtype for x in unit.values()]


def test_units_and_one_rank() -> None:
    params = {
        "tower": {"layers": {0: {"q": torch.ones(3), "k": torch.ones(2)}}, "scale": torch.ones(1)},
        "rest": {"a": torch.ones(1)},
    }

    def f(mesh: Mesh) -> None:
        cut = fstep.shard_params(params, mesh.dp)
        assert isinstance(cut["tower"]["layers"][0], Pieces)
        assert isinstance(cut["tower"]["scale"], Pieces) and isinstance(cut["rest"]["a"], Pieces)
        cut = fstep.shard_params(params, mesh.dp, units=lambda path: path in ("tower", "rest"))
        assert isinstance(cut["tower"], Pieces) and isinstance(cut["rest"], Pieces)
        cut = fstep.shard_params(params, mesh.dp, units=lambda path: False)
        assert isinstance(cut["tower"]["layers"][0]["q"], Pieces)
        assert fstep.shard_params(params, mesh.cp) is params

    fstep.simulate(f, dp=2)
    assert fstep.shard_params(params, Axis("dp"), dtype=torch.bfloat16) is params
    assert_same_bits(fstep.unshard_params(fstep.gather_params(params)), params)
    assert fstep.scatter_grads(params, params)["rest"]["a"] is params["rest"]["a"]


def test_a_template_needs_no_memory() -> None:
    """A rank can say which pieces it will hold before there are any params."""

    def f(mesh: Mesh) -> None:
        template = fstep.shard_params(fstep.tree_map(lambda x: x.to("meta"), make_params()), mesh.dp)
        assert all(x.is_meta for x in fstep.tree_leaves(template))
        assert [p.flat for p in fstep.places(template)] == [p.flat for p in fstep.places(sharded(mesh))]

    fstep.simulate(f, dp=2)


def test_bad_input() -> None:
    def raises(error: type[Exception], message: str, f: Any) -> None:
        with pytest.raises(error, match=message):
            fstep.simulate(f, dp=2)

    raises(TypeError, "shard_params: axis is a Mesh; pass an axis of the mesh", lambda m: fstep.shard_params({}, m))
    raises(TypeError, "shard_params: dtype is torch.int8; pass a floating", lambda m: sharded(m, dtype=torch.int8))
    raises(TypeError, "shard_params: reduce_dtype is torch.int8", lambda m: sharded(m, reduce_dtype=torch.int8))
    raises(ValueError, "shard_params: sums is 'layer'; pass one of 'microbatch', 'step'", lambda m: sharded(m, sums="layer"))
    raises(TypeError, "shard_params: a leaf of 'w' is a float; pass a tree", lambda m: fstep.shard_params({"w": 1.0}, m.dp))
    raises(
        ValueError,
        "shard_params: 'embed' is sharded already; pass what unshard_params returns",
        lambda m: fstep.shard_params(sharded(m), m.dp),
    )
    for name, axis in {"tp": lambda m: m.tp, "pp": lambda m: m.pp, "dp\\+tp": lambda m: m.over("dp", "tp")}.items():
        raises(
            ValueError,
            rf"shard_params: axis is '{name}', .*; pass mesh.over.*, mesh.dp or mesh.cp",
            lambda m, axis=axis: fstep.shard_params(make_params(), axis(m)),
        )
    over_dp = {"tower": {"w": torch.ones(4, 2), "norm": torch.ones(3)}}
    raises(
        ValueError,
        r"shard_params: 'tower.w' is a Shard over axis 'dp', ranks of which are on axis 'dp\+cp' too; pass params that all",
        lambda m: fstep.shard_params(
            {"tower": {**over_dp["tower"], "w": fstep.Shard.cut(over_dp["tower"]["w"], axis=m.dp, dim=0)}},
            m.over("dp", "cp"),
            units=lambda path: path == "tower",
        ),
    )
    raises(
        TypeError,
        r"fold_layers: layers are one unit of shard_params, .* or pass gather_params\(layers\)",
        lambda m: stage(sharded(m, units=lambda path: path == "layers"), None, tokens(0)[0]),
    )
    raises(TypeError, "fold_layers: layers is a list; pass a dict", lambda m: fstep.fold_layers(block, [], torch.ones(1)))
    (cut, _) = fstep.simulate(sharded, dp=2)
    alone = dataclasses.replace(cut["norm"], axis=Axis("dp", 2))
    with pytest.raises(ValueError, match="gather_params: axis 'dp' has 2 ranks and no transport between them; use these"):
        fstep.gather_params(alone)


# The moves -----------------------------------------------------------------------------------------------------------


@on_sizes
@pytest.mark.parametrize("how", ["gather_params", "scatter_grads", "fold_layers"])
def test_transposes(sizes: dict[str, int], how: str) -> None:
    """sum <gather(p), y_r> over ranks and elements == sum <p, gather^T(y)>."""

    def f(mesh: Mesh) -> tuple[float, float]:
        params, rank = sharded(mesh), data_axis(mesh).rank
        y = fstep.tree_map(lambda x: Key.seed(rank).fold_in(x.numel()).normal(x.shape, dtype=x.dtype), make_params())

        def product(p: Any) -> Tensor:
            if how != "fold_layers":
                return dot(fstep.gather_params(p), y)
            return fstep.fold_layers(
                lambda i, layer, x: x + dot(layer, y["layers"][i]), p["layers"], torch.tensor(0.0).double()
            )

        value, grads = fstep.value_and_grad(product)(params)
        if how == "scatter_grads":
            grads = fstep.scatter_grads(y, params)
        return float(value), float(dot(params, grads))

    values, products = zip(*fstep.simulate(f, **sizes), strict=True)
    assert sum(values) == pytest.approx(sum(products), rel=1e-12) and abs(sum(values)) > 1e-3


def dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(fstep.tree_leaves(a), fstep.tree_leaves(b), strict=True)]).sum()


def test_a_second_derivative_goes_through_gather_params() -> None:
    """Of sum_r r |w|^4 / 4 the gradient is 3 |w|^2 w with two ranks, r 1 and 2; of half its square along v, by hand."""
    w = torch.arange(1.0, 21.0, dtype=torch.float64) / 10

    def f(mesh: Mesh, take: Any) -> Tensor:
        cut = fstep.shard_params({"w": w}, mesh.dp)
        factor = mesh.dp.rank + 1.0

        def energy(p: Any) -> Tensor:
            return factor * fstep.gather_params(p)["w"].square().sum().square() / 4

        def half_square(p: Any) -> Tensor:  # a partial sum over the ranks: each has its elements
            return fstep.tree_leaves(take(energy)(p))[0].square().sum() / 2

        return torch.cat([fstep.unshard_params(take(half_square)(cut))["w"]])

    def ours(g: Any) -> Any:
        return lambda p: fstep.value_and_grad(g)(p)[1]

    s = w.square().sum()
    hessian = 3 * (s * torch.eye(20, dtype=torch.float64) + 2 * torch.outer(w, w))
    expected = hessian @ (3 * s * w)
    for take in (ours, torch.func.grad):
        for got in fstep.simulate(lambda mesh, take=take: f(mesh, take), dp=2):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_pull_may_be_called_again() -> None:
    def f(mesh: Mesh) -> None:
        params, batch = sharded(mesh), tokens(mesh.dp.rank)[0]
        value, pull = fstep.vjp(lambda p: loss_fn(p, stage(p, None, batch), batch).num, params)
        once, twice, tripled = pull(torch.ones_like(value)), pull(torch.ones_like(value)), pull(3 * torch.ones_like(value))
        assert_same_bits(once, twice)
        fstep.testing.assert_trees_close(tripled, fstep.tree_map(lambda g: 3 * g, once), rtol=1e-12)

    fstep.simulate(f, dp=2)


def test_gathered_outside_by_vjp() -> None:
    def f(mesh: Mesh) -> None:
        params, batch = sharded(mesh), tokens(mesh.dp.rank, 2)
        whole, pull = fstep.vjp(fstep.gather_params, params)
        _, grads = fstep.pp_forward_backward(stage, loss_fn, whole, batch)
        assert_same_bits(pull(grads)[0], fstep.scatter_grads(grads, params))

    fstep.simulate(f, dp=2)


# Steps ---------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": AdamW(weight_decay=0.1, decay=fstep.matrices),
    "sgd": fstep.SGD(momentum=0.9, weight_decay=0.1, decay=fstep.matrices),
}


@on_sizes
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_steps_have_the_bits_of_plain_data_parallel(sizes: dict[str, int], opt: str) -> None:
    options = {"optimizer": OPTIMIZERS[opt]}
    plain = fstep.simulate(lambda mesh: run_steps(mesh, **options), **sizes)
    for more in ({}, {"outside": True}, {"donate": True}, {"f": fstep.remat(block)}):
        cut = fstep.simulate(lambda mesh, more=more: run_steps(mesh, zero(mesh), **options, **more), **sizes)
        for (params, grads, metrics), (params0, grads0, metrics0) in zip(cut, plain, strict=True):
            assert_same_bits(params, params0)
            assert_same_bits(grads, grads0)
            fstep.testing.assert_trees_close(metrics, metrics0, rtol=1e-12)


@on_sizes
def test_several_microbatches(sizes: dict[str, int]) -> None:
    plain = fstep.simulate(lambda mesh: run_steps(mesh, num=3), **sizes)
    outside = fstep.simulate(lambda mesh: run_steps(mesh, zero(mesh), num=3, outside=True), **sizes)
    inside = fstep.simulate(lambda mesh: run_steps(mesh, zero(mesh), num=3), **sizes)
    for a, b, c in zip(plain, outside, inside, strict=True):
        assert_same_bits(b[:2], a[:2])
        # Summed over ranks first and microbatches then: rounded elsewhere.
        fstep.testing.assert_trees_close(c[:2], a[:2], rtol=1e-12)
    one = run_steps(Mesh(), num=3)
    assert not fstep.tree_leaves(one)[0].equal(fstep.tree_leaves(plain[0])[0]), "the ranks see other tokens"


@on_sizes
def test_clipped_by_the_norm_of_the_whole(sizes: dict[str, int]) -> None:
    plain = fstep.simulate(lambda mesh: run_steps(mesh, max_norm=0.01), **sizes)
    cut = fstep.simulate(lambda mesh: run_steps(mesh, zero(mesh), max_norm=0.01), **sizes)
    for a, b in zip(plain, cut, strict=True):
        fstep.testing.assert_trees_close(b, a, rtol=1e-12)
    norm = torch.stack([g.norm() for g in fstep.tree_leaves(cut[0][1])]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert len({float(metrics["grad_norm"]) for _, _, metrics in cut}) == 1


def test_bfloat16_gathers_of_float32_pieces() -> None:
    """As a plain step whose params are cast in the loss: the same roundings, and sums in float32."""

    def plain_block(i: int, layer: Any, x: Tensor) -> Tensor:
        return block(i, fstep.cast(layer, torch.bfloat16), x)

    def plain(mesh: Mesh) -> Any:
        def run(p: Any, mb: Tensor) -> fstep.Ratio:
            p = fstep.cast(p, torch.bfloat16)
            return loss_fn(p, stage(p, None, mb), mb)

        _, grads = fstep.value_and_grad(run)(make_params(torch.float32), tokens(mesh.dp.rank)[0])
        return fstep.psum(grads, axis=mesh.dp)

    def cut(mesh: Mesh, **options: Any) -> Any:
        params = fstep.shard_params(make_params(torch.float32), mesh.dp, dtype=torch.bfloat16, **options)
        mb = tokens(mesh.dp.rank)[0]
        _, grads = fstep.value_and_grad(lambda p: loss_fn(p, stage(p, None, mb), mb))(params)
        assert {x.dtype for x in fstep.tree_leaves(grads)} == {torch.float32}
        return fstep.unshard_params(grads)

    expected = fstep.simulate(plain, dp=4)[0]
    for got in fstep.simulate(cut, dp=4):
        assert_same_bits(got, expected)
    low = fstep.simulate(lambda mesh: cut(mesh, reduce_dtype=torch.bfloat16), dp=4)[0]
    # Rounded once more, after the sum.
    assert_same_bits(low, fstep.tree_map(lambda x: x.bfloat16().float(), expected))
    assert any(not torch.equal(a, b) for a, b in zip(fstep.tree_leaves(low), fstep.tree_leaves(expected), strict=True))

    def scattered(mesh: Mesh) -> Any:
        params = fstep.shard_params(make_params(torch.float32), mesh.dp, reduce_dtype=torch.bfloat16)
        grads = fstep.scatter_grads(fstep.tree_map(lambda x: x + mesh.dp.rank, make_params(torch.float32)), params)
        assert {x.dtype for x in fstep.tree_leaves(grads)} == {torch.float32}
        return fstep.unshard_params(grads)

    # 16-bit floats are added in float32 and rounded once; what is added is rounded before.
    rounded = [fstep.tree_map(lambda x, r=r: (x + r).bfloat16().float(), make_params(torch.float32)) for r in (0, 1)]
    by_hand = fstep.tree_map(lambda a, b: (a + b).bfloat16().float(), *rounded)
    assert_same_bits(fstep.simulate(scattered, dp=2)[0], by_hand)


FROZEN = {
    "layers": lambda path: path.startswith("layers.2"),
    "leaves": lambda path: path in ("layers.1.up", "layers.3.norm", "head"),
    "all layers": lambda path: path in ("embed", "norm"),
    "first": lambda path: path in ("layers.0.down",),
    "lower ones": lambda path: path.startswith(("layers.3", "layers.2.norm")),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_frozen(frozen: str, outside: bool) -> None:
    options = {"trainable": FROZEN[frozen], "num": 2, "optimizer": AdamW(weight_decay=0.1, decay=fstep.matrices)}
    plain = fstep.simulate(lambda mesh: run_steps(mesh, **options), dp=3)
    cut = fstep.simulate(lambda mesh: run_steps(mesh, zero(mesh), outside=outside, **options), dp=3)
    for a, b in zip(plain, cut, strict=True):
        assert fstep.tree_paths(b[1]) == [p for p in fstep.tree_paths(make_params()) if FROZEN[frozen](p)]
        fstep.testing.assert_trees_close(b, a, rtol=1e-12)


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_leaves_of_a_unit_get_no_gradient(frozen: str) -> None:
    """Nothing is computed for them, since what a layer sees of them requires none."""

    def f(mesh: Mesh) -> Any:
        seen: dict[str, bool] = {}

        def watched(i: int, layer: Any, x: Tensor) -> Tensor:
            seen.update({f"layers.{i}.{name}": w.requires_grad for name, w in layer.items()})
            return block(i, layer, x)

        def loss(p: Any) -> Tensor:
            whole = fstep.gather_params(p)
            paths = zip(fstep.tree_paths(whole), fstep.tree_leaves(whole), strict=True)
            assert {path: w.requires_grad for path, w in paths} == {path: FROZEN[frozen](path) for path in paths_of_all}
            mb = tokens(mesh.dp.rank)[0]
            return loss_fn(p, stage(p, None, mb, watched), mb).num

        paths_of_all = fstep.tree_paths(make_params())
        fstep.value_and_grad(loss, trainable=FROZEN[frozen])(sharded(mesh))
        assert seen == {path: FROZEN[frozen](path) for path in paths_of_all if path.startswith("layers")}

    fstep.simulate(f, dp=2)


def test_frozen_leaves_take_no_room_in_what_is_sent() -> None:
    def f(mesh: Mesh, trainable: Any) -> list[int]:
        axis, diary = with_diary(mesh.dp)
        params = fstep.shard_params(make_params(), axis)
        fstep.pp_forward_backward(stage, loss_fn, params, tokens(mesh.dp.rank), trainable=trainable)
        return [n for name, n in diary.calls if name == "sum"]

    # The two rows hold 45 + 5 and 45 elements; of the norms alone, 5 and none.
    assert fstep.simulate(lambda mesh: f(mesh, lambda path: path.startswith("layers")), dp=2)[0] == [2 * 50] * 4
    assert fstep.simulate(lambda mesh: f(mesh, lambda path: path.endswith("norm")), dp=2)[0] == [2 * 5] * 5


# Optimizers ----------------------------------------------------------------------------------------------------------


def test_decay_is_asked_about_the_whole_parameter() -> None:
    def f(mesh: Mesh) -> None:
        asked: dict[str, tuple[int, ...]] = {}

        def decay(path: str, leaf: Tensor) -> bool:
            asked[path] = tuple(leaf.shape)
            return fstep.matrices(path, leaf)

        params = sharded(mesh)
        for opt in (AdamW(weight_decay=0.5, decay=decay), fstep.SGD(weight_decay=0.5, decay=decay)):
            state = fstep.init_state(params, opt)
            new = fstep.unshard_params(opt.update(state, fstep.tree_map(torch.zeros_like, params), lr=1.0).params)
            for path, a, b in zip(
                fstep.tree_paths(params), fstep.tree_leaves(make_params()), fstep.tree_leaves(new), strict=True
            ):
                assert asked[path] == tuple(a.shape)
                torch.testing.assert_close(b, a if path.endswith("norm") else a / 2)

    fstep.simulate(f, dp=3)


def test_muon_says_that_it_needs_whole_matrices() -> None:
    message = "muon.init: `matrices` chose 'layers.0.down', of which this rank holds a part over axis 'dp', and Muon needs"
    with pytest.raises(ValueError, match=message):
        fstep.simulate(lambda mesh: fstep.muon.init(fstep.shard_params(make_params(), mesh.dp)), dp=2)
    layer = {"layers": {0: {"q": torch.ones(4, 4)}}}
    with pytest.raises(ValueError, match=r"'layers.0.q', of which this rank holds a part over axis 'tp'"):
        fstep.simulate(
            lambda mesh: fstep.muon.init(fstep.tree_map(lambda x: Shard.cut(x, axis=mesh.tp, dim=0), layer)), tp=2
        )

    def f(mesh: Mesh) -> Any:
        """Layers whole, the rest cut: the usual way to have both."""
        cut = {k: v if k == "layers" else fstep.shard_params(v, mesh.dp) for k, v in make_params().items()}
        batch = tokens(mesh.dp.rank)
        loss, grads = fstep.pp_forward_backward(stage, loss_fn, cut, batch)
        grads, _ = fstep.finalize_grads(grads, loss, mesh=mesh)
        return fstep.unshard_params(fstep.muon.update(fstep.init_state(cut, fstep.muon), grads, lr=0.1).params)

    plain = fstep.simulate(lambda mesh: run_steps(mesh, optimizer=fstep.muon, steps=1), dp=2)
    for got, expected in zip(fstep.simulate(f, dp=2), plain, strict=True):
        assert_same_bits(got, expected[0])


def test_nan_on_one_rank_is_skipped_by_all() -> None:
    def f(mesh: Mesh) -> None:
        state = fstep.init_state(sharded(mesh), fstep.adamw)
        mb = tokens(mesh.dp.rank)[0]

        def run(p: Any) -> fstep.Ratio:
            loss = loss_fn(p, stage(p, None, mb), mb)
            return fstep.Ratio(loss.num * (torch.nan if mesh.dp.rank == 1 else 1.0), loss.den)

        loss, grads = fstep.value_and_grad(run)(state.params)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh)
        new = fstep.adamw.update(state, grads, lr=0.1)
        assert int(new.skipped) == 1 and float(metrics["nonfinite"]) == 1
        assert_same_bits(new.params, state.params)

    fstep.simulate(f, dp=3)


def test_nothing_is_changed() -> None:
    def f(mesh: Mesh) -> None:
        mb = tokens(mesh.dp.rank)
        fstep.testing.assert_pure(lambda p: fstep.shard_params(p, mesh.dp), make_params())
        params = sharded(mesh)
        for g in (fstep.gather_params, fstep.unshard_params, lambda p: fstep.pp_forward_backward(stage, loss_fn, p, mb)):
            fstep.testing.assert_pure(g, params)
        whole = make_params()
        fstep.testing.assert_pure(fstep.scatter_grads, whole, params)
        fresh = sharded(mesh)
        fstep.adamw.update(fstep.init_state(fresh, fstep.adamw), fstep.tree_map(torch.ones_like, fresh), lr=0.1, donate=True)
        assert not torch.equal(fstep.unshard_params(fresh)["norm"], whole["norm"])
        assert_same_bits(whole, make_params())

    fstep.simulate(f, dp=2)


def test_gradients_of_another_shape_are_refused() -> None:
    def f(mesh: fstep.Mesh, grads: Any) -> Any:
        return fstep.scatter_grads(grads, fstep.shard_params({"layers": {0: {"w": torch.ones(4, 2)}}}, mesh.dp))

    for shape in ((2, 4), (4, 3), (8,)):
        with pytest.raises(ValueError, match=r"scatter_grads: the gradient of 'w' has shape .*, and its parameter"):
            fstep.simulate(lambda mesh, s=shape: f(mesh, {"layers": {0: {"w": torch.ones(s)}}}), dp=2)
    with pytest.raises(ValueError, match=r"scatter_grads: a unit has the leaves \['w'\], and grads has a NoneType"):
        fstep.simulate(lambda mesh: f(mesh, {"layers": {0: None}}), dp=2)


@fstep.pytree
class Part:
    """A stage's params as somebody's own node."""

    embed: Any
    layers: Any
    head: Any


def _tied_trees() -> dict[str, Any]:
    key = fstep.Key.seed(3)
    e, w = key.normal((7, 4)).double(), [{"w": key.fold_in(i).normal((4, 4)).double()} for i in range(3)]
    return {
        "fields": Part(e, dict(enumerate(w)), fstep.Tied("embed")),
        "list": [e, w, fstep.Tied("0")],
        "units": {
            "io": {"e": e, "n": torch.ones(4).double()},
            "layers": w,
            "head": {"w": fstep.Tied("io.e"), "n": torch.ones(4).double()},
        },
    }


@pytest.mark.parametrize("kind", ["fields", "list", "units"])
@pytest.mark.parametrize("whole_units", [False, True], ids=["leaves", "units"])
def test_a_tied_parameter_has_the_bits_of_plain_dp_in_any_tree(kind: str, whole_units: bool) -> None:
    """What it is tied to is found by its path: in a field, in a list, inside a unit that is cut."""

    def parts(p: Any) -> tuple[Tensor, Any]:
        p = fstep.gather_params(p)
        return (p.embed, p.layers) if kind == "fields" else (p[0], p[1]) if kind == "list" else (p["io"]["e"], p["layers"])

    def stage(p: Any, x: Any, mb: Tensor) -> Tensor:
        e, layers = parts(p)
        x = e[mb]
        for layer in layers.values() if isinstance(layers, dict) else layers:
            x = torch.tanh(x @ layer["w"])
        return x

    def loss(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
        logp = torch.log_softmax(x @ parts(p)[0].T, -1)
        return fstep.Ratio(-logp[torch.arange(len(mb)), mb.roll(-1)].sum(), torch.tensor(float(len(mb))).double())

    def f(mesh: Mesh, zero: bool) -> Any:
        g = torch.Generator().manual_seed(mesh.dp.rank)
        batch = [torch.randint(0, 7, (4 + i,), generator=g) for i in range(3)]
        params = _tied_trees()[kind]
        if zero:
            units = (lambda path: True) if whole_units else (lambda path: False)
            params = fstep.shard_params(params, mesh.dp, sums="step", units=units)
        total, grads = fstep.pp_forward_backward(stage, loss, params, batch)
        return fstep.tree_leaves(fstep.unshard_params(fstep.finalize_grads(grads, total, mesh=mesh)[0]))

    plain, ours = (fstep.simulate(lambda mesh, z=z: f(mesh, z), dp=2)[0] for z in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_stages_of_nodes_of_ones_own_share_what_is_tied() -> None:
    """The part that refers to it gets it in the field that is empty there."""
    whole = _tied_trees()["fields"]
    mb = [torch.tensor([1, 2, 3, 0, 5])]

    def stage(p: Any, x: Any, mb: Tensor) -> Tensor:
        x = p.embed[mb] if x is None else x
        for i in sorted(p.layers):
            x = torch.tanh(x @ p.layers[i]["w"])
        return x

    def loss(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
        logp = torch.log_softmax(x @ p.embed.T, -1)
        return fstep.Ratio(-logp[torch.arange(len(mb)), mb.roll(-1)].sum(), torch.tensor(float(len(mb))).double())

    first = Part(whole.embed, {0: whole.layers[0]}, None)
    cut = fstep.Stages({0: first, 1: Part(None, {1: whole.layers[1], 2: whole.layers[2]}, whole.head)})
    _, want = fstep.pp_forward_backward(stage, loss, whole, mb)
    _, got = fstep.pp_forward_backward(stage, loss, cut, mb, schedule="interleaved")
    assert torch.equal(got.parts[0].embed, want.embed)
    assert torch.equal(got.parts[1].layers[2]["w"], want.layers[2]["w"])
    nowhere = fstep.Stages({0: {"embed": whole.embed}, 1: (fstep.Tied("embed"),)})
    with pytest.raises(ValueError, match="params are tied to 'embed', for which a part of them has no place"):
        fstep.pp_forward_backward(stage, loss, nowhere, mb, schedule="interleaved")
