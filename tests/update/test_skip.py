"""Who says that a step is skipped: finalize_grads, which has read every gradient for the norm, or the optimizer, which reads
them again. Either way all ranks decide alike, and memory is passed over as often as by torch's clip and fused step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
from fstep.ratio import Ratio
from fstep.state.state import init_state
from fstep.tree import tree_leaves, tree_map
from fstep.update.adamw import AdamW
from fstep.update.muon import Muon
from fstep.update.rows import matrices
from fstep.update.sgd import SGD
from tests.update.cases import assert_close, bits, make_grads, make_params, run

OPTIMIZERS = {
    "adamw": AdamW(weight_decay=0.1, decay=matrices),
    "sgd": SGD(weight_decay=0.1),
    "momentum": SGD(momentum=0.9, nesterov=True),
    "muon": Muon(rest=AdamW(weight_decay=0.1)),
}
NAN = float("nan")


@pytest.fixture(params=OPTIMIZERS)
def opt(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


def recorded(grads: Any, mode: str) -> Any:
    return tree_map(lambda g: g.requires_grad_(), grads) if mode == "recording" else grads


@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor(1.0), torch.tensor(NAN), torch.tensor(2)], ids=str)
@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
def test_what_is_skipped_changes_nothing(opt: Any, mode: str, skip: torch.Tensor, device: str) -> None:
    for bad in (1.0, NAN):
        state = run(opt, make_params(device=device), 2)
        before = bits((state.params, state.opt))
        grads = recorded(tree_map(lambda g, bad=bad: g * bad, make_grads(state.params, 9)), mode)
        new = opt.update(state, grads, lr=0.1, skip=skip.to(device), donate=mode == "donate")
        assert bits((new.params, new.opt)) == before
        assert (int(new.step), int(new.skipped)) == (3, 1)


@pytest.mark.parametrize("skip", [torch.tensor(False), torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("mode", ["pure", "donate", "recording"])
def test_what_is_not_skipped_is_applied(opt: Any, mode: str, skip: torch.Tensor, device: str) -> None:
    params = make_params(device=device)
    expected = opt.update(run(opt, params, 2), make_grads(params, 9), lr=0.1)
    state = run(opt, tree_map(torch.clone, params), 2)
    new = opt.update(state, recorded(make_grads(params, 9), mode), lr=0.1, skip=skip, donate=mode == "donate")
    assert_close((new.params, new.opt), (expected.params, expected.opt))
    assert int(new.skipped) == 0
    # It is not looked again: whoever says that a gradient is fine is believed.
    state = run(opt, tree_map(torch.clone, params), 2)
    new = opt.update(state, recorded(tree_map(lambda g: g * NAN, make_grads(params, 9)), mode), lr=0.1, skip=skip)
    assert all(p.isnan().all() for p in tree_leaves(new.params))
    assert int(new.skipped) == 0


@pytest.mark.parametrize("bad", [1.0, NAN])
@pytest.mark.parametrize("donate", [False, True])
def test_told_is_looked(opt: Any, bad: float, donate: bool) -> None:
    """With the metric of finalize_grads an update is, to the bit, the one that looks for itself."""
    params = make_params()

    def step(told: bool) -> Any:
        state = run(opt, tree_map(torch.clone, params), 2)
        grads = make_grads(params, 9)
        grads["layers"][0]["norm"][1] *= bad
        loss = Ratio(torch.tensor(3.0), torch.tensor(2.0))
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=0.5, donate=donate)
        more = {"skip": metrics["nonfinite"]} if told else {}
        return opt.update(state, grads, lr=0.1, donate=donate, **more)

    assert bits(step(True)) == bits(step(False))


def test_vmap(opt: Any) -> None:
    if isinstance(opt, Muon):
        opt = Muon(matrices=lambda path, leaf: False)  # a batched product may round otherwise
    params = make_params()
    state, grads = run(opt, params, 1), make_grads(params, 3)

    def update(skip: torch.Tensor) -> list[torch.Tensor]:
        return tree_leaves(opt.update(state, grads, lr=0.1, skip=skip))

    out = torch.func.vmap(update)(torch.tensor([True, False]))
    for i, skip in enumerate((True, False)):
        assert_close([x[i].double() for x in out], [x.double() for x in update(torch.tensor(skip))], 1e-13)


@pytest.mark.parametrize(
    ("skip", "error", "message"),
    [
        (True, TypeError, "skip is True; pass a 0-d tensor"),
        ({"nonfinite": 0.0}, TypeError, "skip is {'nonfinite': 0.0}; pass a 0-d tensor"),
        (torch.zeros(2), ValueError, r"skip has shape \(2,\); pass a 0-d tensor"),
    ],
)
def test_bad_skip(opt: Any, skip: Any, error: type[Exception], message: str) -> None:
    params = make_params()
    with pytest.raises(error, match=rf"^\w+\.update: {message}"):
        opt.update(init_state(params, opt), make_grads(params, 0), lr=0.1, skip=skip)


class _Passes(TorchDispatchMode):
    """Count the operations that are given a tensor, or a list of tensors, of more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [x for a in args for x in (a if isinstance(a, list | tuple) else [a])]
        if any(isinstance(x, torch.Tensor) and x.numel() > 100 for x in flat) and "detach" not in str(func):
            self.seen[str(func).removeprefix("aten.").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("told", [False, True])
def test_passes_over_memory(told: bool) -> None:
    """Three, each over all leaves at once: a norm, a multiplication, the step. Not told, the optimizer reads once more."""
    params = {"layers": {str(i): {"q": torch.ones(16, 16), "up": torch.ones(16, 32)} for i in range(5)}}
    state = init_state(params, fstep.adamw)
    grads = tree_map(torch.ones_like, params)
    loss = Ratio(torch.tensor(3.0), torch.tensor(2.0))
    with _Passes() as passes:
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=0.5, donate=True)
        skip = metrics["nonfinite"] if told else None
        fstep.adamw.update(state, grads, lr=0.1, skip=skip, donate=True)
    once = {"_foreach_norm": 1, "_foreach_mul_": 1, "_fused_adamw_": 1}
    assert dict(passes.seen) == once | ({} if told else {"aminmax": 10})


def test_nothing_waits_for_the_device(opt: Any, device: str, no_waiting: Any) -> None:
    params = make_params(torch.float32, device)
    state, grads = init_state(params, opt), make_grads(params, 0)
    loss = Ratio(torch.tensor(3.0, device=device), torch.tensor(2.0, device=device))

    def step(state: Any, grads: Any) -> Any:
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=1.0, donate=True)
        return opt.update(state, grads, lr=0.1, skip=metrics["nonfinite"], donate=True)

    state = step(state, make_grads(params, 1))  # the first call may prepare the kernels
    with no_waiting():
        step(state, grads)


@pytest.mark.parametrize("bad", [1.0, NAN, float("inf")])
def test_a_rank_without_a_piece_decides_like_the_others(bad: float) -> None:
    """ZeRO gives 16 elements to one of two ranks. The other has nothing to look at, and still has to count alike."""

    def step(mesh: fstep.Mesh) -> Any:
        params = fstep.shard_params({"w": torch.ones(16, dtype=torch.float64)}, mesh.dp)
        state = init_state(params, fstep.adamw)
        grads = tree_map(lambda p: torch.full_like(p, bad), params)
        one = torch.ones((), dtype=torch.float64)
        grads, metrics = fstep.finalize_grads(grads, Ratio(one, one), mesh=mesh, max_norm=1.0)
        new = fstep.adamw.update(state, grads, lr=0.1, skip=metrics["nonfinite"])
        return len(new.params["w"].value), int(new.skipped), int(new.opt.count)

    skipped = int(bad != 1.0)
    assert fstep.simulate(step, dp=2) == [(16, skipped, 1 - skipped), (0, skipped, 1 - skipped)]


@pytest.mark.parametrize("poison", [None, 0, 2])
def test_nan_on_one_rank_is_skipped_by_all(opt: Any, poison: int | None) -> None:
    def step(mesh: fstep.Mesh) -> Any:
        params = make_params()
        grads = tree_map(lambda g: g * (mesh.rank + 1), make_grads(params, 4))
        if mesh.rank == poison:
            grads["embed"][1, 1] = NAN
        one = torch.ones((), dtype=torch.float64)
        grads, metrics = fstep.finalize_grads(grads, Ratio(one, one), mesh=mesh, max_norm=0.5)
        return opt.update(init_state(params, opt), grads, lr=0.1, skip=metrics["nonfinite"])

    params = make_params()
    alone, _ = fstep.finalize_grads(  # ranks have 1, 2 and 3 times these, and weight 3 together
        tree_map(lambda g: g * 6, make_grads(params, 4)),
        Ratio(torch.tensor(3.0), torch.tensor(3.0)),
        mesh=fstep.Mesh(),
        max_norm=0.5,
    )
    expected = opt.update(init_state(params, opt), alone, lr=0.1)
    results = fstep.simulate(step, dp=3)
    for state in results:
        assert int(state.skipped) == int(poison is not None)
        if poison is None:
            assert_close(state.params, expected.params)
        else:
            assert bits(state.params) == bits(params)
    assert all(bits(state) == bits(results[0]) for state in results)


@pytest.mark.parametrize("recording", [False, True])
def test_a_negative_weight_hides_nothing(recording: bool) -> None:
    """A policy's weights may sum to less than 0: the norm is a norm, and infinity over -2 is no small number."""
    loss = Ratio(torch.tensor(6.0), torch.tensor(-2.0))
    grads = {"a": torch.tensor([6.0, -8.0]).requires_grad_(recording)}
    out, metrics = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=2.5)
    assert torch.allclose(out["a"], torch.tensor([-1.5, 2.0]), rtol=1e-6)
    assert (float(metrics["grad_norm"].detach()), float(metrics["nonfinite"])) == (5.0, 0.0)
    grads = {"a": torch.tensor([float("inf"), -8.0]).requires_grad_(recording)}
    out, metrics = fstep.finalize_grads(grads, loss, mesh=fstep.Mesh(), max_norm=2.5)
    assert out["a"].isnan().all()
    assert metrics["nonfinite"] == 1


def test_a_rank_that_holds_nothing_has_to_be_told(opt: Any) -> None:
    """ZeRO on two ranks, of which one has no element and sees no NaN: it skips as the other does, or says that it cannot."""
    if isinstance(opt, Muon):
        pytest.skip("its matrices are not cut")

    def train(mesh: fstep.Mesh, told: bool) -> tuple[Any, ...]:
        zero = fstep.shard_params({"w": torch.ones(4)}, mesh.dp)
        state = init_state(zero, opt)
        for bad in (False, True, False):
            grads = tree_map(lambda g, bad=bad: torch.full_like(g, NAN if bad else 1.0), zero)
            grads, metrics = fstep.finalize_grads(grads, Ratio(torch.ones(()), torch.ones(())), mesh=mesh)
            state = opt.update(state, grads, lr=0.1, skip=metrics["nonfinite"] if told else None)
        return int(state.step), int(state.skipped), tree_leaves(state.params)[0].numel()

    assert fstep.simulate(lambda mesh: train(mesh, True), dp=2) == [(3, 1, 4), (3, 1, 0)]
    with pytest.raises(ValueError, match=r"update: this rank holds no element of a gradient .*; pass skip="):
        fstep.simulate(lambda mesh: train(mesh, False), dp=2)
