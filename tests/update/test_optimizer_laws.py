"""The laws that every optimizer keeps, one table of them: pure, donated, skipped, frozen, differentiated, mapped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fstep
from fstep.grad.autodiff import split_trainable
from fstep.state.state import DonatedError, TrainState, init_state
from fstep.tree import tree_leaves, tree_map, tree_map_with_path, tree_paths, tree_replace_leaves
from fstep.update.adamw import AdamW
from fstep.update.muon import Muon, hidden_matrices
from fstep.update.rows import matrices
from fstep.update.sgd import SGD
from tests.update.cases import assert_close, bits, make_grads, make_params, randn, run, versions


def stacks(path: str, leaf: torch.Tensor) -> bool:
    return hidden_matrices(path, leaf) or "experts" in path


OPTIMIZERS = {
    "adamw": AdamW(weight_decay=0.1, decay=matrices),
    "sgd": SGD(weight_decay=0.1),
    "momentum": SGD(momentum=0.9, nesterov=True, weight_decay=0.1, decay=matrices),
    "muon": Muon(weight_decay=0.1, matrices=stacks, rest=AdamW(weight_decay=0.1), rest_lr=0.5),
}


@pytest.fixture(params=OPTIMIZERS)
def opt(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


def with_bad(grads: Any, where: str, value: float) -> Any:
    def put(path: str, g: torch.Tensor) -> torch.Tensor:
        g = g.clone()
        if path == where:
            g.view(-1)[-1] = value
        return g

    return tree_map_with_path(put, grads)


@pytest.mark.parametrize("recording", [False, True])
def test_pure(opt: Any, device: str, recording: bool) -> None:
    state = run(opt, make_params(device=device), 2)
    grads = tree_map(lambda g: g.requires_grad_(recording), make_grads(state.params, 9))
    before = bits((state, grads)), versions((state, grads))
    new = opt.update(state, grads, lr=0.1)
    assert (bits((state, grads)), versions((state, grads))) == before
    kept = {x.data_ptr() for x in tree_leaves((state.params, state.opt, grads)) if x.numel()}
    assert not kept & {x.data_ptr() for x in tree_leaves((new.params, new.opt)) if x.numel()}
    assert bits(new.params) != bits(state.params)


def test_donated_is_pure_with_the_old_memory(opt: Any, device: str) -> None:
    params = make_params(device=device)
    state = run(opt, params, 2)
    grads = make_grads(params, 9)
    expected = opt.update(state, grads, lr=0.1)
    memory = [x.data_ptr() for x in tree_leaves((state.params, state.opt)) if x.ndim]
    old, kept = tree_leaves(state.params)[0], bits(grads)
    version = old._version
    new = opt.update(state, grads, lr=0.1, donate=True)
    assert bits(new) == bits(expected)
    assert bits(grads) == kept
    assert [x.data_ptr() for x in tree_leaves((new.params, new.opt)) if x.ndim] == memory
    assert not {g.data_ptr() for g in tree_leaves(grads)} & set(memory)
    for field in ("params", "opt", "step", "skipped"):
        with pytest.raises(DonatedError, match=f"TrainState.{field}"):
            getattr(state, field)
    assert old._version > version  # so that a graph that still needs the old value raises instead of lying


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
def test_nonfinite_gradient_changes_nothing(opt: Any, device: str, mode: str, value: float) -> None:
    for where in ("embed", "layers.0.q", "layers.0.norm", "layers.0.experts"):
        state = run(opt, make_params(device=device), 2)
        params, memory = bits(state.params), bits(state.opt)
        grads = with_bad(make_grads(state.params, 9), where, value)
        if mode == "recording":
            grads = tree_map(lambda g: g.requires_grad_(), grads)
        new = opt.update(state, grads, lr=0.1, donate=mode == "donate")
        assert bits(new.params) == params
        assert bits(new.opt) == memory
        assert (int(new.step), int(new.skipped)) == (3, 1)


@pytest.mark.parametrize("mode", ["pure", "recording"])
def test_after_a_skipped_step_all_is_as_if_it_had_not_been(opt: Any, mode: str) -> None:
    params = make_params()
    state, other = init_state(params, opt), init_state(params, opt)
    for i in range(3):
        grads = make_grads(params, i)
        if mode == "recording":
            grads = tree_map(lambda g: g.requires_grad_(), grads)
        state = opt.update(state, tree_map(lambda g: g * float("nan"), grads), lr=0.1)
        state, other = opt.update(state, grads, lr=0.1), opt.update(other, grads, lr=0.1)
    assert bits((state.params, state.opt)) == bits((other.params, other.opt))
    assert (int(state.step), int(state.skipped)) == (6, 3)


def test_finite_but_huge_gradients_are_not_skipped() -> None:
    params = {"layers": {"w": torch.ones(2, 2)}}
    for opt in OPTIMIZERS.values():
        grads = {"layers": {"w": torch.full((2, 2), 3e38)}}
        new = opt.update(init_state(params, opt), grads, lr=torch.tensor(0.0))
        assert int(new.skipped) == 0


def test_derivative_of_a_skipped_step_is_finite(opt: Any) -> None:
    params = tree_map(lambda p: p.requires_grad_(), make_params())
    state = init_state(params, opt)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    grads = with_bad(make_grads(params, 0), "embed", float("nan"))
    new = opt.update(state, grads, lr=lr)
    out = torch.autograd.grad(sum(p.sum() for p in tree_leaves(new.params)), [lr, *tree_leaves(params)])
    assert out[0] == 0
    assert all((g == 1).all() for g in out[1:])


def test_frozen_leaves_are_none_all_the_way(opt: Any) -> None:
    params = make_params()
    params["ids"] = torch.arange(3)

    def trainable(path: str) -> bool:
        return path in ("layers.0.q", "layers.0.norm")

    state = init_state(params, opt, trainable=trainable)
    per_leaf = [path for path in tree_paths(state.opt) if "layers" in path]
    assert per_leaf or (isinstance(opt, SGD) and not opt.momentum)
    assert all(path.endswith(("layers.0.q", "layers.0.norm")) for path in per_leaf)
    assert not [path for path in tree_paths(state.opt) if path.endswith(("embed", "ids", "experts"))]
    frozen = tree_map_with_path(lambda path, p: None if trainable(path) else bits(p), params)
    grads = tree_map_with_path(lambda path, p: torch.ones_like(p) if trainable(path) else None, params)
    for donate in (False, True):
        state = opt.update(state, grads, lr=0.1, donate=donate)
        assert tree_map_with_path(lambda path, p: None if trainable(path) else bits(p), state.params) == frozen
    assert bits(state.params["layers"][0]["q"]) != bits(params["layers"][0]["q"])
    # A leaf moves the same whether others are frozen or not.
    full = init_state(make_params(), opt)
    for _ in range(2):
        full = opt.update(full, tree_map(torch.ones_like, full.params), lr=0.1)
    assert bits(full.params["layers"][0]["q"]) == bits(state.params["layers"][0]["q"])


@pytest.mark.parametrize("make", [lambda d: AdamW(weight_decay=0.1, decay=d), lambda d: SGD(weight_decay=0.1, decay=d)])
def test_decay_is_asked_about_each_trained_parameter_by_name_and_as_a_whole(make: Any) -> None:
    shapes = {"a": (3,), "b": (2, 4), "c": (5, 2), "d": (7,)}

    def decayed(mesh: fstep.Mesh) -> Any:
        asked: dict[str, tuple[int, ...]] = {}

        def decay(path: str, leaf: torch.Tensor) -> bool:
            asked[path] = tuple(leaf.shape)
            return path == "c"

        params: Any = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
        if mesh.dp.size > 1:
            params = fstep.shard_params(params, mesh.dp)
        state = init_state(params, make(decay), trainable=lambda path: path != "b")
        grads = tree_map(torch.zeros_like, split_trainable(params, lambda path: path != "b")[0])
        new = make(decay).update(state, grads, lr=0.5, skip=torch.tensor(False))
        moved = {path for path, p in zip(tree_paths(new.params), tree_leaves(new.params), strict=True) if (p != 1).any()}
        return asked, moved, sum(p.numel() for p in tree_leaves(params["c"]))

    ranks = [decayed(fstep.Mesh()), *fstep.simulate(decayed, dp=2)]
    for asked, moved, held in ranks:
        assert asked == {name: shape for name, shape in shapes.items() if name != "b"}
        assert moved == ({"c"} if held else set())
    assert any(held for _, _, held in ranks[1:])


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)])
def test_formula_is_kernel(opt: Any, device: str, lr: Any) -> None:
    state = run(opt, make_params(device=device), 2)
    recorded = state
    for i in range(3):
        grads = make_grads(state.params, i)
        state = opt.update(state, grads, lr=lr)
        recorded = opt.update(recorded, tree_map(lambda g: g.requires_grad_(), grads), lr=lr)
    assert all(p.requires_grad for p in tree_leaves(recorded.params))
    assert_close(recorded.params, state.params)
    assert_close(recorded.opt, state.opt)


def test_lr_on_the_device_is_read_there(opt: Any, device: str, no_waiting: Any) -> None:
    params = make_params(torch.float32, device)
    expected = run(opt, params, 2, lr=0.125)
    for dtype in (torch.float32, torch.float64):
        got = run(opt, params, 2, lr=torch.tensor(0.125, device=device, dtype=dtype))
        assert_close(got.params, expected.params, 1e-6)
    state, grads = init_state(params, opt), make_grads(params, 0)
    lr: Any = 0.125 if device == "cpu" else torch.tensor(0.125, device=device)
    opt.update(state, grads, lr=lr)  # the first call may prepare the kernels
    with no_waiting():
        opt.update(state, grads, lr=lr)
        opt.update(state, grads, lr=0.125, donate=True)


def test_vmap_is_a_loop(opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A batched product may be another kernel than a single one, and rounding to bfloat16 makes much of the difference.
    monkeypatch.setattr("fstep.update.muon.NEWTON_SCHULZ_DTYPE", torch.float64)
    states = [run(opt, make_params(seed=s), 1) for s in (0, 50)]
    grads = [make_grads(states[0].params, s) for s in (3, 4)]
    grads[1] = with_bad(grads[1], "embed", float("nan"))  # one is skipped, one is not

    def update(leaves: list[torch.Tensor], g: Any, lr: Any) -> list[torch.Tensor]:
        # torch.func.vmap refuses the Nones that a state may hold, so the tree is taken apart and put together here.
        return tree_leaves(opt.update(tree_replace_leaves(states[0], leaves), g, lr=lr))

    stacked = [torch.stack(pair) for pair in zip(*map(tree_leaves, states), strict=True)]
    lrs = torch.tensor([0.1, 0.2], dtype=torch.float64)
    out = torch.func.vmap(update)(stacked, tree_map(lambda a, b: torch.stack([a, b]), *grads), lrs)
    for i in range(2):
        got = tree_replace_leaves(states[0], [x[i] for x in out])
        expected = opt.update(states[i], grads[i], lr=float(lrs[i]))
        assert_close((got.params, got.opt), (expected.params, expected.opt))
        assert int(got.skipped) == int(expected.skipped) == i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("donate", [False, True])
def test_low_precision_is_computed_in_float32(opt: Any, device: str, dtype: torch.dtype, donate: bool) -> None:
    w, g = randn(0, 8, 33, dtype=dtype, device=device), randn(1, 8, 33, dtype=dtype, device=device)

    def moved(param_dtype: torch.dtype, opt_dtype: torch.dtype, grad_dtype: torch.dtype) -> TrainState:
        state = init_state({"w": w.clone().to(param_dtype)}, opt)
        state = dataclasses.replace(state, opt=tree_map(lambda x: x.to(opt_dtype) if x.ndim else x, state.opt))
        return opt.update(state, {"w": g.to(grad_dtype)}, lr=0.1, donate=donate)

    wide = moved(torch.float32, torch.float32, torch.float32)
    one_rounding = 2 * torch.finfo(dtype).eps
    for opt_dtype in (torch.float32, dtype):
        low = moved(dtype, opt_dtype, dtype)
        assert low.params["w"].dtype == dtype
        assert_close(tree_map(lambda x: x.float(), (low.params, low.opt)), (wide.params, wide.opt), one_rounding)
    # Float32 params with 16-bit gradients: the gradient is converted, nothing is rounded.
    mixed = moved(torch.float32, torch.float32, dtype)
    assert bits((mixed.params, mixed.opt)) == bits((wide.params, wide.opt))


def test_strides_do_not_matter(opt: Any, device: str) -> None:
    # A fused kernel walks through memory; with other strides it would pair the wrong elements.
    w, g = make_params(device=device)["layers"][0]["q"], make_grads(make_params(device=device), 3)["layers"][0]["q"]

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.T.contiguous().T

    expected = opt.update(init_state({"layers": {"w": w}}, opt), {"layers": {"w": g}}, lr=0.1)
    for p, d in ((transposed(w), g), (w, transposed(g)), (transposed(w), transposed(g)), (w[:, ::1], g)):
        for donate in (False, True):
            state = init_state({"layers": {"w": p.clone()}}, opt)
            new = opt.update(state, {"layers": {"w": d}}, lr=0.1, donate=donate)
            assert_close((new.params, new.opt), (expected.params, expected.opt), 1e-14)
    # Every second column of a larger tree, moments included: the same strides, but with other numbers in the gaps.
    wide = run(opt, {"layers": {"w": torch.cat([w, w], 1)}}, 1)
    part = tree_map(lambda x: x[:, ::2] if x.ndim == 2 else x, wide)
    packed = tree_map(torch.clone, tree_map(lambda x: x.contiguous(), part))
    grad = {"layers": {"w": torch.cat([g, g], 1)[:, ::2]}}
    expected = opt.update(packed, grad, lr=0.1)
    gaps = bits(wide.params["layers"]["w"][:, 1::2])
    new = opt.update(part, grad, lr=0.1, donate=True)
    assert_close((new.params, new.opt), (expected.params, expected.opt), 1e-14)
    assert bits(wide.params["layers"]["w"][:, 1::2]) == gaps
    ones = torch.ones((), dtype=w.dtype, device=device).expand(w.shape)  # what autograd returns for a sum
    new = opt.update(init_state({"layers": {"w": w}}, opt), {"layers": {"w": ones}}, lr=0.1)
    expected = opt.update(init_state({"layers": {"w": w}}, opt), {"layers": {"w": ones.contiguous()}}, lr=0.1)
    assert bits(new.params) == bits(expected.params)


def test_donation_of_shared_memory_is_refused(opt: Any) -> None:
    w = torch.ones(2, 2)
    state = init_state({"a": w, "b": w}, opt)
    grads = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    with pytest.raises(
        ValueError, match=r"update: donate=True, but 'a' and 'b' would be updated twice, because they share memory"
    ):
        opt.update(state, grads, lr=0.1, donate=True)
    assert bits(state.params["a"]) == bits(torch.ones(2, 2))
    opt.update(state, grads, lr=0.1)


def test_donation_of_overlapping_memory_is_refused(opt: Any) -> None:
    w = torch.ones(4, 2)
    for a, b in ((w, w[1:]), (w[1:3], w), (w, w[3:])):
        state = init_state({"a": a, "b": b, "c": torch.ones(2, 2)}, opt)
        with pytest.raises(ValueError, match="update: donate=True, but 'a' and 'b' would be updated twice"):
            opt.update(state, tree_map(torch.ones_like, state.params), lr=0.1, donate=True)
    state = init_state({"a": w[:2], "b": w[2:]}, opt)  # neighbours share nothing
    expected = opt.update(state, tree_map(torch.ones_like, state.params), lr=0.1)
    assert bits(opt.update(state, tree_map(torch.ones_like, state.params), lr=0.1, donate=True).params) == bits(
        expected.params
    )
    state = init_state({"a": torch.ones(2, 1).expand(2, 2)}, opt)
    with pytest.raises(ValueError, match="donate=True, but 'a' would be updated twice"):
        opt.update(state, {"a": torch.ones(2, 2)}, lr=0.1, donate=True)


def test_donation_under_a_derivative_is_refused(opt: Any) -> None:
    params = make_params()
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="donate=True while an outer derivative"):
        opt.update(init_state(params, opt), make_grads(params, 0), lr=lr, donate=True)
    with torch.no_grad():
        opt.update(init_state(params, opt), make_grads(params, 0), lr=lr, donate=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {**g, "extra": torch.ones(1)}, "grads has a leaf 'extra' that params has not"),
        (lambda g: {"layers": g["layers"]}, "grads has no leaf 'embed' that params has"),
        (lambda g: {**g, "embed": None}, "grads has no leaf 'embed' that opt state has"),
        (lambda g: {**g, "embed": g["embed"].T}, r"gradient of 'embed' has shape \(4, 5\).*shape \(5, 4\)"),
        (lambda g: {**g, "embed": {"w": g["embed"]}}, "at 'embed'"),
        (lambda g: {**g, "layers": {0: torch.ones(1)}}, "grads has a leaf 'layers.0' that params has not"),
    ],
)
def test_structure_errors_name_the_path(opt: Any, change: Any, message: str) -> None:
    params = make_params()
    state = init_state(params, opt)
    with pytest.raises(ValueError, match=rf"^\w+\.update: .*{message}"):
        opt.update(state, change(make_grads(params, 0)), lr=0.1)


def test_a_gradient_for_a_frozen_leaf_is_refused(opt: Any) -> None:
    params = make_params()
    state = init_state(params, opt, trainable=lambda path: path != "embed")
    with pytest.raises(ValueError, match="grads has a leaf 'embed' that opt state has not"):
        opt.update(state, make_grads(params, 0), lr=0.1)


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (-0.1, ValueError, "lr is -0.1"),
        (float("nan"), ValueError, "lr is nan"),
        (torch.ones(1), ValueError, r"lr has shape \(1,\)"),
        (None, TypeError, "lr is None"),
        (True, TypeError, "lr is True"),
    ],
)
def test_bad_lr(opt: Any, lr: Any, error: type[Exception], message: str) -> None:
    params = make_params()
    with pytest.raises(error, match=rf"^\w+\.update: {message}"):
        opt.update(init_state(params, opt), make_grads(params, 0), lr=lr)


def test_bad_params(opt: Any) -> None:
    with pytest.raises(TypeError, match=r"^\w+\.init: leaf 'n' is torch.int64 and cannot be trained; freeze it"):
        opt.init({"n": torch.arange(2), "w": torch.ones(1)})
    with pytest.raises(TypeError, match=r"leaf 'flag' is torch\.bool"):
        opt.init({"flag": torch.ones(2).bool(), "w": torch.ones(1)}, trainable=lambda path: path == "flag")
    with pytest.raises(ValueError, match="params has no leaves"):
        opt.init({"w": None})


@pytest.mark.parametrize("donate", [False, True])
def test_a_stage_that_is_frozen_counts_its_steps(opt: Any, donate: bool) -> None:
    """Its rank of a pipeline has nothing to train, and goes along."""
    params = {"w": torch.ones(2, 2), "n": torch.arange(2)}
    state = init_state(params, opt, trainable=lambda path: False)
    nothing = {"w": None, "n": None}
    with pytest.raises(ValueError, match="update: this rank holds no element of a gradient"):
        opt.update(state, nothing, lr=0.1, donate=donate)
    for skip in (0.0, 1.0):
        state = opt.update(state, nothing, lr=0.1, skip=torch.tensor(skip), donate=donate)
    assert (int(state.step), int(state.skipped)) == (2, 1)
    assert state.params["w"].equal(torch.ones(2, 2)) and state.params["n"].equal(torch.arange(2))


def test_a_pipeline_with_a_frozen_stage_steps_as_one_process(opt: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = {i: torch.randn(3, 3, generator=generator, dtype=torch.float64) for i in range(2)}
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)

    def stage(params: Any, h: Any, mb: torch.Tensor) -> torch.Tensor:
        h = mb if h is None else h
        for i in sorted(params["layers"]):
            h = (h @ params["layers"][i]).tanh()
        return h

    def loss(params: Any, h: torch.Tensor, mb: torch.Tensor) -> fstep.Ratio:
        return fstep.Ratio(h.square().sum(), torch.tensor(5.0, dtype=torch.float64))

    def step(mesh: fstep.Mesh) -> Any:
        mine = whole if mesh.pp.size == 1 else {mesh.pp.rank: whole[mesh.pp.rank]}
        only = {"trainable": lambda path: path == "layers.1"}
        state = init_state({"layers": mine}, opt, **only)
        total, grads = fstep.pp_forward_backward(stage, loss, state.params, list(x), axis=mesh.pp, **only)
        grads, metrics = fstep.finalize_grads(grads, total, mesh=mesh, max_norm=0.1)
        new = opt.update(state, grads, lr=0.1, skip=metrics["nonfinite"])
        return new.params["layers"], metrics, int(new.step)

    (want, metrics, _), ranks = step(fstep.Mesh()), fstep.simulate(step, pp=2)
    assert not want[1].equal(whole[1])
    for rank, (layers, found, count) in enumerate(ranks):
        torch.testing.assert_close(layers[rank], want[rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["grad_norm"], metrics["grad_norm"], rtol=1e-12, atol=0)
        assert count == 1


def test_state_of_another_optimizer_is_refused() -> None:
    params = make_params()
    for opt in OPTIMIZERS.values():
        for other in OPTIMIZERS.values():
            if type(other) is not type(opt):
                with pytest.raises(TypeError, match=r"state.opt is \w+State; make it with"):
                    opt.update(init_state(params, other), make_grads(params, 0), lr=0.1)


def test_the_rest_of_the_state_is_carried_along(opt: Any) -> None:
    params = make_params()
    state = init_state(params, opt)
    new = opt.update(state, make_grads(params, 0), lr=0.1)
    assert isinstance(new, TrainState)
    assert (new.key, new.data) == (state.key, state.data)
    assert (int(new.step), int(new.skipped)) == (1, 0)


def test_one_graph_for_many_steps(opt: Any) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    params = make_params()
    torch._dynamo.reset()
    step = torch.compile(opt.update, backend=backend, fullgraph=True)
    state = expected = init_state(params, opt)
    for i in range(3):
        grads = make_grads(params, i)
        lr = torch.tensor(0.1 * (i + 1), dtype=torch.float64)
        state, expected = step(state, grads, lr=lr), opt.update(expected, grads, lr=lr)
    assert_close((state.params, state.opt), (expected.params, expected.opt))
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads the allocator of CUDA")
@pytest.mark.parametrize("donate", [False, True])
def test_memory_of_an_update(opt: Any, donate: bool) -> None:
    params = {"layers": {str(i): torch.ones(1024, 1024, device="cuda") for i in range(32)}}
    unit = 32 * 4 * 1024**2
    state, grads = init_state(params, opt), tree_map(torch.ones_like, params)
    copies = len([x for x in tree_leaves((state.params, state.opt)) if x.numel() > 1]) / 32
    for donate_now in (donate, donate):  # the second is measured: the first may load kernels
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state = opt.update(state, grads, lr=0.1, donate=donate_now)
        peak = (torch.cuda.max_memory_allocated() - before) / unit
    # Pure: a new copy of params and state. Donated: temporaries of one leaf.
    assert peak < (0.35 if donate else copies + 0.35)


def test_gradients_of_another_kind_are_refused(opt: Any) -> None:
    state = init_state({"w": torch.ones(3, 2)}, opt)
    w = torch.ones(3, 2)
    for grad, said in ((w.long(), "torch.int64 at 'w'"), (w.to(torch.complex64), "torch.complex64 at 'w'")):
        with pytest.raises(TypeError, match=f"update: grads has {said}, where the parameter is torch.float32"):
            opt.update(state, {"w": grad}, lr=0.1)
    with pytest.raises(TypeError, match=r"update: grads has a torch.sparse_coo tensor at 'w'; pass a dense one"):
        opt.update(state, {"w": w.to_sparse()}, lr=0.1)
    with pytest.raises(TypeError, match=r"finalize_grads: the gradient 'w' is torch.sparse_coo; pass dense"):
        fstep.finalize_grads({"w": w.to_sparse()}, fstep.Ratio(torch.ones(()), torch.ones(())), mesh=fstep.Mesh())
