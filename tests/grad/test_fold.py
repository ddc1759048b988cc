"""fold_layers on pieces: the plain loop, two layers in memory at a time, and the same calls on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
import fstep.testing
from fstep import Mesh, Stages
from fstep.grad import call, fold, pieces, shard
from fstep_models.dense import Config, Dense
from tests.grad.zero_cases import (
    LAYERS,
    Diary,
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


def cut_with_diary(mesh: Mesh) -> tuple[Any, Diary]:
    """Cut params, with a diary of the layers' axis only."""
    axis, diary = with_diary(mesh.dp)
    params = make_params()
    layers = fstep.shard_params({"layers": params["layers"]}, axis)
    return {**fstep.shard_params(params, mesh.dp), **layers}, diary


def gradients(params: Any, batch: list[Tensor], f: Callable[..., Any] = block, **options: Any) -> Any:
    return fstep.pp_forward_backward(lambda p, x, mb: stage(p, x, mb, f), loss_fn, params, batch, **options)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    # What torch imports when something is first rematerialised leaves a cycle behind.
    fstep.value_and_grad(lambda x: fstep.remat(torch.sin)(x).sum())(torch.ones(1))
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# When, and how much ---------------------------------------------------------------------------------------------------


def test_what_is_called_when() -> None:
    """Each gather a layer ahead, each sum waited for a layer late; what a layer does itself stands between."""

    def f(mesh: Mesh) -> list[str]:
        params, diary = cut_with_diary(mesh)
        numbers = {"gather": iter([0, 1, 2, 3, 2, 1, 0]), "gathered": iter([0, 1, 2, 3, 2, 1, 0])}
        numbers |= {"sum": iter([3, 2, 1, 0]), "summed": iter([3, 2, 1, 0])}

        def layer(i: int, whole: Any, x: Tensor) -> Tensor:
            diary.note("layer", i)
            x = block(i, whole, x)
            assert x.grad_fn is not None
            x.grad_fn.register_prehook(lambda grads: diary.note("back", i))  # type: ignore[func-returns-value]
            return x

        gradients(params, tokens(mesh.dp.rank), layer)
        return [f"{name} {n if name in ('layer', 'back') else next(numbers[name])}" for name, n in diary.calls]

    expected = """
        gather 0, gathered 0, gather 1, layer 0, gathered 1, gather 2, layer 1, gathered 2, gather 3, layer 2, gathered 3,
        layer 3, gather 2, back 3,
        gathered 2, gather 1, sum 3, back 2, summed 3,
        gathered 1, gather 0, sum 2, back 1, summed 2,
        gathered 0, sum 1, back 0, summed 1,
        sum 0, summed 0
    """
    for calls in fstep.simulate(f, dp=2):
        assert calls == [call.strip() for call in expected.split(",")]


def test_layers_below_the_lowest_trained_one_are_not_gathered_again() -> None:
    def f(mesh: Mesh) -> list[str]:
        params, diary = cut_with_diary(mesh)
        gradients(params, tokens(mesh.dp.rank), trainable=lambda path: path in ("layers.2.norm", "layers.3.up"))
        return [name for name, _ in diary.calls if name in ("gather", "sum")]

    assert fstep.simulate(f, dp=2)[0] == ["gather"] * 4 + ["gather", "sum", "sum"]


def bent(i: int, layer: Any, x: Tensor) -> Tensor:
    """What a layer may do to its params before it computes: views, slices, a transposed copy of a view."""
    up, down = layer["up"].split(5)[0], layer["down"].mT[:5]
    return x + torch.tanh(x @ up.mT * layer["norm"]) @ down


REMAT = {
    "kept": block,
    "remat": fstep.remat(block),
    "remat mm": fstep.remat(block, [torch.ops.aten.mm.default]),
    "bent": bent,
}


@pytest.mark.parametrize("f", REMAT.values(), ids=REMAT)
@pytest.mark.parametrize("num", [1, 3])
def test_two_layers_are_in_memory_at_a_time(f: Any, num: int) -> None:
    def run(mesh: Mesh) -> tuple[int, int, Any]:
        params, diary = cut_with_diary(mesh)
        _, grads = gradients(params, tokens(mesh.dp.rank, num), f)
        return diary.most, diary.alive(), fstep.unshard_params(grads)

    with no_collector():
        found = fstep.simulate(run, dp=2)
    assert [(most, left) for most, left, _ in found] == [(2, 0), (2, 0)]
    plain = fstep.simulate(
        lambda mesh: fstep.psum(gradients(make_params(), tokens(mesh.dp.rank, num), f)[1], axis=mesh.dp), dp=2
    )
    fstep.testing.assert_trees_close(found[0][2], plain[0], rtol=1e-12)


def test_between_the_passes_one_layer_is_in_memory() -> None:
    def run(mesh: Mesh) -> None:
        params, diary = cut_with_diary(mesh)
        mb = tokens(mesh.dp.rank)[0]
        for f in (block, fstep.remat(block)):
            value, pull = fstep.vjp(lambda p, f=f: loss_fn(p, stage(p, None, mb, f), mb).num, params)
            assert diary.alive() == 1  # the last one, with which the backward pass begins
            pull(torch.ones_like(value))
            assert diary.alive() == 0  # though the graph is kept, to pull once more
            del pull
        with torch.no_grad():
            stage(params, None, mb)
        assert diary.alive() == 0 and diary.most == 2

    with no_collector():
        fstep.simulate(run, dp=2)


@pytest.mark.parametrize("f", [block, fstep.remat(block)], ids=["kept", "remat"])
def test_nothing_of_a_step_outlives_it(f: Any) -> None:
    """No cycles: what a step makes is gone when its result is, without the garbage collector."""

    def run(mesh: Mesh) -> list[weakref.ref]:
        seen: list[weakref.ref] = []

        def layer(i: int, whole: Any, x: Tensor) -> Tensor:
            seen.extend(weakref.ref(t) for t in fstep.tree_leaves(whole))
            saved = torch.tanh(x)  # its node saves its own result
            x = f(i, whole, x) + saved
            seen.extend([weakref.ref(saved), weakref.ref(x)])
            return x

        params = fstep.shard_params(make_params(), mesh.dp)
        _, grads = gradients(params, tokens(mesh.dp.rank, 2), layer)
        seen += [weakref.ref(t) for t in fstep.tree_leaves(grads)]
        # Nor of a forward pass whose backward pass never comes.
        stage(fstep.tree_map(lambda w: w.detach().requires_grad_(), params), None, tokens(mesh.dp.rank)[0], layer)
        return seen

    with no_collector():
        found = fstep.simulate(run, dp=2)
        assert all(len(refs) > 30 and not any(ref() is not None for ref in refs) for refs in found)


# As the plain loop ---------------------------------------------------------------------------------------------------


def test_plain_layers_are_a_plain_loop() -> None:
    calls = []

    def f(i: int, layer: Any, x: Any) -> Any:
        calls.append(i)
        assert layer is layers[i]
        return (x[0] + layer, x[1])

    layers = {10: torch.tensor(1.0), 9: torch.tensor(2.0)}
    x = (torch.tensor(0.0), "kept")
    assert fstep.fold_layers(f, layers, x) == (torch.tensor(3.0), "kept") and calls == [9, 10]
    assert fstep.fold_layers(f, {}, x) is x


def test_x_may_be_a_tree_and_layers_part_plain() -> None:
    """Some units of a layer are cut, some layers are not; x has two tensors and a number."""
    params = {
        i: {"a": {"w": torch.randn(3, 3).double()}, "b": torch.randn(20).double(), "c": torch.randn(3).double()}
        for i in range(3)
    }

    def f(i: int, layer: Any, x: Any) -> Any:
        h, aux, n = x
        h = torch.tanh(h @ layer["a"]["w"] + layer["c"])
        return h, aux + h.square().sum() * layer["b"].sum(), n + 1

    def loss(p: Any, h: Tensor) -> Tensor:
        h, aux, n = fstep.fold_layers(f, p, (h, torch.zeros((), dtype=h.dtype), 0))
        assert n == 3
        return h.sum() + aux

    def run(mesh: Mesh) -> Any:
        def cut(i: int, layer: Any) -> Any:
            if i == 1:
                return layer
            return {
                "a": fstep.shard_params(layer["a"], mesh.dp, units=lambda p: True),
                "b": fstep.shard_params(layer["b"], mesh.dp),
                "c": layer["c"],
            }

        zero = {i: cut(i, layer) for i, layer in params.items()}
        x = torch.full((2, 3), mesh.dp.rank + 1.0, dtype=torch.float64)
        grads = fstep.value_and_grad(loss, (0, 1))(zero, x)[1]
        plain = fstep.value_and_grad(loss, (0, 1))(params, x)[1]
        summed = fstep.psum(plain[0], axis=mesh.dp)
        for i in range(3):
            for name in "abc":
                expected = summed if i != 1 and name != "c" else plain[0]
                assert_same_bits(fstep.unshard_params(grads[0][i][name]), expected[i][name])
        assert_same_bits(grads[1], plain[1])

    fstep.simulate(run, dp=2)


def test_without_gradients() -> None:
    def run(mesh: Mesh) -> None:
        params, mb = fstep.shard_params(make_params(), mesh.dp), tokens(mesh.dp.rank)[0]
        expected = stage(make_params(), None, mb)
        with torch.no_grad():
            assert torch.equal(stage(params, None, mb), expected)
        with torch.inference_mode():
            assert torch.equal(stage(params, None, mb), expected)
        (loss,) = fstep.pp_forward(stage, loss_fn, params, [mb])
        assert torch.equal(loss.num, loss_fn(make_params(), expected, mb).num)
        # Gradients of x through layers that are constants.
        x = torch.randn(4, 5, dtype=torch.float64)
        ours = fstep.value_and_grad(lambda x: fstep.fold_layers(block, params["layers"], x).square().sum())(x)
        plain = fstep.value_and_grad(lambda x: fstep.fold_layers(block, make_params()["layers"], x).square().sum())(x)
        assert_same_bits(ours, plain)
        # The same where layers could have gradients, and nobody asks.
        layers = fstep.tree_map(lambda w: w.detach().requires_grad_(), params["layers"])
        x.requires_grad_()
        (grad,) = torch.autograd.grad(fstep.fold_layers(block, layers, x).square().sum(), [x])
        assert torch.equal(grad, plain[1])

    fstep.simulate(run, dp=2)


def test_under_torch_func() -> None:
    def run(mesh: Mesh) -> None:
        params, mb = fstep.shard_params(make_params(), mesh.dp), tokens(mesh.dp.rank)[0]

        def loss(p: Any) -> Tensor:
            return loss_fn(p, stage(p, None, mb), mb).num

        fstep.testing.assert_trees_close(torch.func.grad(loss)(params), fstep.value_and_grad(loss)(params)[1], rtol=1e-12)

    fstep.simulate(run, dp=2)


def test_gradients_of_gradients_are_refused() -> None:
    def run(mesh: Mesh) -> None:
        params, mb = fstep.shard_params(make_params(), mesh.dp), tokens(mesh.dp.rank)[0]
        grad = fstep.value_and_grad(lambda p: loss_fn(p, stage(p, None, mb), mb))
        fstep.value_and_grad(lambda p: fstep.tree_leaves(grad(p)[1])[3].sum())(params)

    with pytest.raises(RuntimeError, match=r"fold_layers: its gradient is being recorded, .* give it gather_params"):
        fstep.simulate(run, dp=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_blocks() -> None:
    torch._dynamo.reset()

    def plain(layer: Any, x: Tensor) -> Tensor:
        return block(0, layer, x)

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)

    def run(mesh: Mesh) -> None:
        params, diary = cut_with_diary(mesh)
        mb = tokens(mesh.dp.rank)
        ours = gradients(params, mb, lambda i, layer, x: compiled(layer, x))
        assert diary.most == 2
        expected = gradients(params, mb, lambda i, layer, x: plain(layer, x))
        fstep.testing.assert_trees_close(ours, expected, rtol=1e-12)

    fstep.simulate(run, dp=2)
    torch._dynamo.reset()


# Ranks that differ ----------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_use_its_layers_comes_by() -> None:
    """On rank 1 layers 1 and 2 are left out: its graph has no use of them, and still takes part in gathers and sums."""

    def f(i: int, layer: Any, x: Tensor, skip: bool) -> Tensor:
        return x if skip and i in (1, 2) else block(i, layer, x)

    def run(mesh: Mesh, cut: bool) -> Any:
        params = make_params()
        params = fstep.shard_params(params, mesh.dp) if cut else params
        _, grads = gradients(params, tokens(mesh.dp.rank, 2), lambda i, layer, x: f(i, layer, x, mesh.dp.rank == 1))
        return fstep.unshard_params(grads) if cut else fstep.psum(grads, axis=mesh.dp)

    plain, ours = (fstep.simulate(lambda mesh, cut=cut: run(mesh, cut), dp=2) for cut in (False, True))
    for a, b in zip(plain, ours, strict=True):
        fstep.testing.assert_trees_close(b, a, rtol=1e-12)


def test_an_error_in_a_layer_leaves_no_hooks() -> None:
    saved = []

    def f(i: int, layer: Any, x: Tensor) -> Tensor:
        if i == 2:
            raise ZeroDivisionError("in layer 2")
        return block(i, layer, x)

    def run(mesh: Mesh) -> None:
        params, mb = fstep.shard_params(make_params(), mesh.dp), tokens(mesh.dp.rank)
        with pytest.raises(ZeroDivisionError, match="in layer 2"):
            gradients(params, mb, f)
        x = torch.ones(2, requires_grad=True)
        saved.append((x**2).grad_fn._saved_self is x)  # type: ignore[union-attr]
        gradients(params, mb)

    fstep.simulate(run, dp=2)
    assert saved == [True, True]


# With the other axes --------------------------------------------------------------------------------------------------


def staged(params: Any, ranks: tuple[int, ...], me: int) -> Any:
    """Cut a model for a pipeline: an equal number of layers to each stage."""
    per = LAYERS // len(ranks)
    parts: dict[int, Any] = {}
    for number, rank in enumerate(ranks):
        if rank == me:
            parts[number] = {"layers": {i: params["layers"][i] for i in range(number * per, (number + 1) * per)}}
            parts[number] |= {"embed": params["embed"]} if number == 0 else {}
            parts[number] |= {k: params[k] for k in ("norm", "head")} if number == len(ranks) - 1 else {}
    return Stages(parts) if len(parts) > 1 else next(iter(parts.values()))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"])
@pytest.mark.parametrize("f", [block, fstep.remat(block)], ids=["kept", "remat"])
def test_in_a_pipeline(schedule: str, f: Any) -> None:
    def run(mesh: Mesh, cut: bool, f: Any) -> Any:
        params = staged(make_params(), fstep.stage_ranks(schedule, 2), mesh.pp.rank)
        params = fstep.shard_params(params, mesh.dp) if cut else params
        loss, grads = gradients(params, tokens(mesh.dp.rank, 4), f, axis=mesh.pp, schedule=schedule)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=0.5)
        return fstep.unshard_params(grads), metrics

    plain = fstep.simulate(lambda mesh: run(mesh, False, block), pp=2, dp=2)
    ours = fstep.simulate(lambda mesh: run(mesh, True, f), pp=2, dp=2)
    for a, b in zip(plain, ours, strict=True):
        assert fstep.tree_paths(a) == fstep.tree_paths(b)
        fstep.testing.assert_trees_close(b, a, rtol=1e-12)


CONFIG = Config(
    family="qwen3", vocab=29, dim=16, ffn=24, layers=4, heads=2, kv_heads=2, head_dim=8,
    rope=fstep.Rope(theta=10000.0, dim=8), windows=(0, 3, 0, 0), tied=False, qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"dp": 2, "cp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_dense_steps_have_the_bits_of_the_plain_ones(sizes: dict[str, int], tied: bool, microbatches: int) -> None:
    """Over several microbatches too, if gradients are summed over the ranks once a step, as plain data parallel does."""

    def run(mesh: Mesh, cut: bool) -> Any:
        model = Dense(dataclasses.replace(CONFIG, tied=tied), remat="full" if cut else "none")
        params = model.init(fstep.Key.seed(3), mesh=mesh, dtype=torch.float64)
        if cut:
            sums = "microbatch" if microbatches == 1 and not tied else "step"
            params = fstep.shard_params(params, mesh.over("dp", "cp"), sums=sums)
        state = fstep.init_state(params, fstep.AdamW(weight_decay=0.1, decay=fstep.matrices))
        docs = fstep.make_docs([fstep.Key.seed(i).permutation(29)[:n] for i, n in enumerate((9, 4, 12, 7, 3, 8))])
        split = fstep.split_microbatches(docs, num=microbatches, axis=mesh.dp)
        batch = [fstep.cp_shard(fstep.pack_thd(mb, multiple_of=2 * mesh.cp.size), axis=mesh.cp) for mb in split]

        def loss(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
            return fstep.sft_loss(model.logprobs(p, x, mb, mesh=mesh), mb.weights)

        for _ in range(2):
            total, grads = fstep.pp_forward_backward(model.stage(mesh), loss, state.params, batch, axis=mesh.pp)
            grads, metrics = fstep.finalize_grads(grads, total, mesh=mesh)
            state = fstep.adamw.update(state, grads, lr=0.01, donate=True)
        return fstep.unshard_params((state.params, grads)), metrics

    plain, ours = (fstep.simulate(lambda mesh, cut=cut: run(mesh, cut), **sizes) for cut in (False, True))
    for a, b in zip(plain, ours, strict=True):
        assert_same_bits(b[0], a[0])
        fstep.testing.assert_trees_close(b, a, rtol=1e-12)


@pytest.mark.parametrize(("sums", "times"), [("microbatch", 3), ("step", 1)])
def test_how_often_gradients_are_summed(sums: Any, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit, gathered by `fold_layers` or by `gather_params`, once a microbatch or once a step."""
    calls: list[str] = []
    for module in (fold, shard, call):
        real = module.start_sum
        monkeypatch.setattr(module, "start_sum", lambda *a, real=real: (calls.append(""), real(*a))[1])

    def run(mesh: Mesh) -> Any:
        params = fstep.shard_params({"layers": {0: {"w": torch.ones(3)}}, "head": torch.ones(3)}, mesh.dp, sums=sums)

        def stage(p: Any, x: Any, mb: Tensor) -> Tensor:
            return fstep.fold_layers(lambda i, layer, x: x * layer["w"], p["layers"], mb)

        def loss(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
            return fstep.Ratio((x * fstep.gather_params(p["head"])).sum(), torch.tensor(1.0))

        mbs = [torch.full((3,), mesh.dp.rank + k + 1.0) for k in range(3)]
        return fstep.unshard_params(fstep.pp_forward_backward(stage, loss, params, mbs)[1])

    for grads in fstep.simulate(run, dp=2):
        assert grads["layers"][0]["w"].tolist() == grads["head"].tolist() == [1 + 2 + 3 + 2 + 3 + 4] * 3
    assert len(calls) == 2 * 2 * times


def test_a_head_is_gathered_ahead_and_its_sum_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gather each, begun before the last layer computes; its sum is begun before that layer's backward, read behind."""
    events: list[str] = []

    def note(function: str, name: str) -> None:
        real = getattr(pieces, function)

        def run(node: Any, *args: Any) -> Any:
            if node.slots[0].shape == (5,) and node.axis.rank == 0:
                events.append(name)
            return real(node, *args)

        for module in (fold, shard, call):
            monkeypatch.setattr(module, function, run, raising=False)

    note("start_gather", "gather"), note("start_sum", "sum"), note("finish_sum", "read")

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, rank: int) -> Tensor:
            ctx.rank = rank
            events.extend(["forward"] * (rank == 0))
            return x * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            events.extend(["backward"] * (ctx.rank == 0))
            return g, g, None

    def run(mesh: Mesh) -> None:
        params = {"layers": {i: {"w": torch.ones(1, 5)} for i in range(2)}, "head": torch.ones(5)}
        params = fstep.shard_params(params, mesh.dp)

        def stage(p: Any, x: Any, mb: Tensor) -> Tensor:
            return fstep.fold_layers(
                lambda i, layer, x: Layer.apply(x, layer["w"][0], mesh.dp.rank), p["layers"], mb, ahead=(None, p["head"])
            )

        def loss(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
            return fstep.Ratio((x * fstep.gather_params(p["head"])).sum(), torch.tensor(1.0))

        fstep.pp_forward_backward(stage, loss, params, [torch.ones(5), torch.ones(5)])

    fstep.simulate(run, dp=2)
    one = ["forward", "gather", "forward", "sum", "backward", "backward"]
    assert events == [*one, *one[:3], "read", *one[3:], "read"]


def test_more_ranks_than_elements() -> None:
    """Five ranks, of which most have no piece of most parameters."""
    plain = fstep.simulate(lambda mesh: run_steps(mesh), dp=5)
    ours = fstep.simulate(lambda mesh: run_steps(mesh, lambda p: fstep.shard_params(p, data_axis(mesh))), dp=5)
    for a, b in zip(plain, ours, strict=True):
        assert_same_bits(b[:2], a[:2])
    assert dataclasses.is_dataclass(ours[0][0]) is False


@pytest.mark.parametrize("sums", ["microbatch", "step"])
def test_what_is_computed_from_the_pieces_is_gathered_too(sums: Any) -> None:
    """Scaled, merged, or differentiated inside the loss: a gather begun ahead and sums put off are for the pieces alone."""
    params = {"layers": {0: {"w": torch.full((3,), 2.0)}, 1: {"w": torch.full((3,), 3.0)}}, "head": torch.full((3,), 5.0)}

    def stage(p: Any, x: Any, mb: Tensor) -> Tensor:
        layers = fstep.tree_map(lambda w: 2 * w, p["layers"])
        return fstep.fold_layers(lambda i, layer, x: x * layer["w"], layers, mb, ahead=p["head"])

    def loss(p: Any, x: Tensor, mb: Tensor) -> Any:
        head = fstep.gather_params(fstep.tree_map(lambda w: 3 * w, p["head"]))
        once = fstep.value_and_grad(lambda q: (7 * fstep.gather_params(q["head"])).sum())(p)[1]
        assert fstep.unshard_params(p["head"]).tolist() == [5.0] * 3
        one = torch.tensor(1.0)
        return fstep.Ratio((x * head).sum(), one), {"inner": fstep.Ratio(sum(g.sum() for g in fstep.tree_leaves(once)), one)}

    def run(mesh: Mesh) -> Any:
        zero = params if mesh.size == 1 else fstep.shard_params(params, mesh.dp, sums=sums)
        like = fstep.tree_map(torch.ones_like, zero)

        def scaled(p: Any, x: Tensor, mb: Tensor) -> Any:
            return loss(fstep.tree_map(torch.mul, p, like), x, mb)  # trees of the caller's and of the call

        value, grads = fstep.pp_forward_backward(stage, scaled, zero, [torch.ones(3), torch.ones(3)])
        inner = fstep.psum(value[1]["inner"].num, axis=mesh.dp)
        return value[0].num, inner, fstep.unshard_params(grads)

    ((num, inner, grads),) = fstep.simulate(run, dp=1)
    for got_num, got_inner, got in fstep.simulate(run, dp=2):
        assert got_num == num and got_inner == 2 * inner  # 7 for each element, and once more for the other rank
        fstep.testing.assert_trees_close(got, fstep.tree_map(lambda g: 2 * g, grads), rtol=1e-6)
