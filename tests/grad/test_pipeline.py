"""pp_forward_backward beside one plain backward pass over everything, and the laws of accumulation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
from fstep.grad import own, pipeline
from fstep.grad.pipeline import pp_forward, pp_forward_backward
from fstep.mesh.axis import Axis, Mesh
from fstep.ratio import Ratio
from fstep.tree import Tied, tree_leaves, tree_map
from fstep_models.dense import Config, Dense

DIM = 4


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def params() -> Any:
    return {"layers": {0: randn(DIM, DIM), 1: randn(DIM, DIM)}, "unused": randn(3), "step": torch.tensor(2)}


Microbatch = dict[str, Tensor]


def microbatches(sizes: tuple[int, ...] = (5, 1, 7)) -> list[Microbatch]:
    return [{"x": randn(n, DIM), "w": torch.rand(n, dtype=torch.float64) + 0.5} for n in sizes]


def join(batches: list[Microbatch]) -> Microbatch:
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def stage(params: Any, x: Tensor | None, mb: Microbatch) -> Tensor:
    assert x is None
    return torch.tanh(mb["x"] @ params["layers"][0])


def loss(params: Any, x: Tensor, mb: Microbatch) -> Ratio:
    return Ratio((mb["w"] * (x @ params["layers"][1]).square().sum(-1)).sum(), mb["w"].sum())


def stage_aux(params: Any, x: Tensor | None, mb: Microbatch) -> tuple[Tensor, dict[str, Ratio]]:
    h = stage(params, x, mb)
    return h, {"balance": Ratio(0.3 * (mb["w"] * h.pow(4).sum(-1)).sum(), mb["w"].sum())}


def loss_metrics(params: Any, x: Tensor, mb: Microbatch) -> tuple[Ratio, dict[str, Ratio]]:
    out = loss(params, x, mb)
    return out, {"size": Ratio(x.abs().sum(), torch.tensor(float(x.numel())))}


def by_hand(params: Any, batches: list[Microbatch], aux: bool = False) -> tuple[Tensor, Tensor, Any]:
    """Loss, weight and gradients of the whole batch at once, by one call of torch.autograd.grad."""
    whole = join(batches)
    leaves = [params["layers"][i].clone().requires_grad_() for i in (0, 1)]
    h = torch.tanh(whole["x"] @ leaves[0])
    total = (whole["w"] * (h @ leaves[1]).square().sum(-1)).sum()
    if aux:
        total = total + 0.3 * (whole["w"] * h.pow(4).sum(-1)).sum()
    g = torch.autograd.grad(total, leaves)
    return total.detach(), whole["w"].sum(), {"layers": {0: g[0], 1: g[1]}, "unused": torch.zeros(3).double()}


def check(got: tuple[Any, Any], expected: tuple[Tensor, Tensor, Any], tolerance: float = 1e-12) -> None:
    loss, grads = got
    loss = loss[0] if isinstance(loss, tuple) else loss
    for a, b in zip([loss.num, loss.den, *tree_leaves(grads)], [*expected[:2], *tree_leaves(expected[2])], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert not a.requires_grad


# Accumulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_microbatch_is_the_plain_gradient_bit_for_bit(schedule: str) -> None:
    p, batches = params(), microbatches((6,))
    check(pp_forward_backward(stage, loss, p, batches, schedule=schedule), by_hand(p, batches), 0.0)


@pytest.mark.parametrize("sizes", [(5, 1, 7), (1,) * 6, (0, 3)])
def test_microbatches_add_up_to_the_batch(sizes: tuple[int, ...]) -> None:
    p, batches = params(), microbatches(sizes)
    check(pp_forward_backward(stage, loss, p, batches, axis=Mesh().pp), by_hand(p, batches))
    check(pp_forward_backward(stage, loss, p, tuple(batches)), by_hand(p, batches))


def test_is_value_and_grad_of_the_sum_bit_for_bit() -> None:
    p, batches = params(), microbatches()

    def total(p: Any) -> Ratio:
        return sum((loss(p, stage(p, None, mb), mb) for mb in batches), 0)

    value, grads = fstep.value_and_grad(total)(p)
    got, accumulated = pp_forward_backward(stage, loss, p, batches)
    assert torch.equal(got.num, value.num) and torch.equal(got.den, value.den)
    check((got, accumulated), (value.num, value.den, grads), 1e-13)


def test_structure_of_the_gradients() -> None:
    p, batches = params(), microbatches()
    _, grads = pp_forward_backward(stage, loss, p, batches)
    assert grads["step"] is None and torch.equal(grads["unused"], torch.zeros(3, dtype=torch.float64))
    _, grads = pp_forward_backward(stage, loss, p, batches, trainable=lambda path: path == "layers.1")
    assert grads["unused"] is None and grads["layers"][0] is None
    torch.testing.assert_close(grads["layers"][1], by_hand(p, batches)[2]["layers"][1], rtol=1e-12, atol=1e-12)


def test_all_masked_microbatch_changes_nothing() -> None:
    """Weight 0 everywhere, by a `where`: no NaN, whatever the values; and one that depends on no parameter at all."""
    p, batches = params(), microbatches()
    masked = {"x": torch.full((2, DIM), torch.nan, dtype=torch.float64), "w": torch.zeros(2, dtype=torch.float64)}

    def masked_stage(params: Any, x: Tensor | None, mb: Microbatch) -> Tensor:
        return stage(params, x, {**mb, "x": torch.where(mb["w"][:, None] != 0, mb["x"], 0)})

    for where in range(4):
        given = [*batches[:where], masked, *batches[where:]]
        check(pp_forward_backward(masked_stage, loss, p, given), by_hand(p, batches))

    def constant(params: Any, x: Tensor, mb: Microbatch) -> Ratio:
        return loss(params, x, mb) if mb["w"].any() else Ratio(mb["w"].sum(), mb["w"].sum())

    check(pp_forward_backward(stage, constant, p, [masked, *batches]), by_hand(p, batches))
    got, grads = pp_forward_backward(stage, constant, p, [masked])
    assert got.num == got.den == 0 and not any(g.any() for g in tree_leaves(grads))


# Metrics and auxiliary losses ----------------------------------------------------------------------------------------


def test_metrics_are_summed_and_have_no_gradient() -> None:
    p, batches = params(), microbatches()
    got = pp_forward_backward(stage, loss_metrics, p, batches)
    check(got, by_hand(p, batches))
    (_, metrics), _ = got
    h = torch.tanh(join(batches)["x"] @ p["layers"][0])
    assert metrics.keys() == {"size"} and not metrics["size"].num.requires_grad
    torch.testing.assert_close(metrics["size"].num, h.abs().sum(), rtol=1e-12, atol=1e-12)
    assert metrics["size"].den == h.numel()


def test_auxiliary_losses_join_the_sum_and_are_reported() -> None:
    p, batches = params(), microbatches()
    got = pp_forward_backward(stage_aux, loss_metrics, p, batches)
    check(got, by_hand(p, batches, aux=True))
    (total, metrics), _ = got
    assert list(metrics) == ["size", "balance"]
    main, weight, _ = by_hand(p, batches)
    torch.testing.assert_close(metrics["balance"].num, total.num - main, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["balance"].den, weight, rtol=1e-12, atol=1e-12)
    check(pp_forward_backward(stage_aux, loss, p, batches), by_hand(p, batches, aux=True))


def test_a_pair_of_tensors_is_no_auxiliary_loss() -> None:
    p, batches = params(), microbatches()

    def pair(params: Any, x: Any, mb: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return stage(params, x, mb), {"not a ratio": mb["x"]}

    got = pp_forward_backward(pair, lambda params, x, mb: loss(params, x[0], mb), p, batches)
    check(got, by_hand(p, batches))


# Purity and memory ---------------------------------------------------------------------------------------------------


def test_nothing_is_touched() -> None:
    p, batches = params(), microbatches()
    before = [x.clone() for x in tree_leaves((p, batches))]
    with torch.no_grad():
        got = pp_forward_backward(stage, loss, p, batches)
    check(got, by_hand(p, batches))
    for x, old in zip(tree_leaves((p, batches)), before, strict=True):
        assert torch.equal(x, old) and x._version == 0 and x.grad is None and not x.requires_grad
    assert all(g.grad_fn is None and g.is_leaf for g in tree_leaves(got[1]))


def test_frozen_parameters_that_require_grad_stay_outside() -> None:
    """Parameters of a module, inside no_grad: nothing is recorded for the frozen one, and nobody's .grad is written."""
    weights = [torch.nn.Parameter(randn(DIM, DIM)) for _ in range(2)]
    for w in weights:
        w.grad = torch.full_like(w, 7.0)

    def frozen_first(params: Any, x: Any, mb: Microbatch) -> Tensor:
        assert not params["layers"][0].requires_grad and params["layers"][1].requires_grad
        return stage(params, x, mb)

    p = {"layers": dict(enumerate(weights))}
    with torch.no_grad():
        pp_forward_backward(frozen_first, loss, p, microbatches(), trainable=lambda path: path == "layers.1")
    assert all(torch.equal(w.grad, torch.full_like(w, 7.0)) for w in weights)


class LiveSizes(TorchDispatchMode):
    """Count the results that have as many elements as the one big parameter."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func in (torch.ops.aten.detach.default, torch.ops.aten.t.default, torch.ops.aten.transpose.int)
        if isinstance(out, Tensor) and out.numel() == self.numel and not func._schema.is_mutable and not views:
            self.made += 1
        return out


def test_gradients_are_added_up_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each microbatch makes one gradient; the sum is no further tensor, and torch.autograd.grad makes no second set."""
    p = {"big": randn(16, 64)}

    def f(params: Any, x: Any, mb: Tensor) -> Tensor:
        return mb @ params["big"]

    def sum_of(params: Any, x: Tensor, mb: Tensor) -> Ratio:
        return Ratio(x.square().sum(), torch.tensor(float(len(mb))))

    def gone(*_: Any, **__: Any) -> None:
        raise AssertionError("a second set of gradients")

    monkeypatch.setattr(torch.autograd, "grad", gone)
    with LiveSizes(16 * 64) as sizes:
        pp_forward_backward(f, sum_of, p, [randn(2, 16) for _ in range(5)])
    assert sizes.made == 5


# Outer derivatives ---------------------------------------------------------------------------------------------------


def gradient_norm(run: Callable) -> Callable:
    def norm(w: Tensor, batches: list[Microbatch], p: Any) -> Tensor:
        value, grads = run({**p, "layers": {**p["layers"], 0: w}}, batches)
        return value.num / value.den + sum(g.square().sum() for g in tree_leaves(grads)) / value.den

    return norm


@pytest.mark.parametrize("aux", [False, True])
def test_outer_derivatives(aux: bool) -> None:
    p, batches = params(), microbatches()
    p.pop("step")
    w = p["layers"][0]

    def mine(p: Any, batches: list[Microbatch]) -> Any:
        return pp_forward_backward(stage_aux if aux else stage, loss, p, batches)

    def theirs(p: Any, batches: list[Microbatch]) -> Any:
        def total(p: Any) -> Tensor:
            parts = [loss(p, stage(p, None, mb), mb).num for mb in batches]
            return sum(parts) + (sum(stage_aux(p, None, mb)[1]["balance"].num for mb in batches) if aux else 0)

        grads, value = torch.func.grad_and_value(total)(p)
        return Ratio(value, sum(mb["w"].sum() for mb in batches)), grads

    def run(p: Any, batches: list[Microbatch]) -> Any:
        value, grads = mine(p, batches)
        return (value[0] if aux else value), grads

    expected = torch.func.grad(gradient_norm(theirs))(w, batches, p)
    torch.testing.assert_close(torch.func.grad(gradient_norm(run))(w, batches, p), expected, rtol=1e-11, atol=1e-11)
    _, recorded = fstep.value_and_grad(gradient_norm(run))(w, batches, p)
    torch.testing.assert_close(recorded, expected, rtol=1e-11, atol=1e-11)
    # A microbatch's own weights, as in learning what to learn from.
    _, by_weight = fstep.value_and_grad(gradient_norm(run), 1)(w, batches, p)
    func_by_weight = torch.func.grad(gradient_norm(theirs), 1)(w, batches, p)
    for a, b in zip(tree_leaves(by_weight), tree_leaves(func_by_weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert by_weight[0]["w"].abs().min() > 0


def test_inference_mode_is_refused() -> None:
    p, batches = params(), microbatches()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"pp_forward_backward: torch.inference_mode allows no"):
        pp_forward_backward(stage, loss, p, batches)


# Forward only --------------------------------------------------------------------------------------------------------


def test_pp_forward_keeps_the_order_and_no_graph() -> None:
    p, batches = params(), microbatches()
    p["layers"][0].requires_grad_()
    seen = []

    def score(params: Any, x: Tensor, mb: Microbatch) -> dict[str, Any]:
        assert not torch.is_grad_enabled()
        seen.append(len(mb["x"]))
        return {"h": x, "n": len(x)}

    out = pp_forward(stage_aux, score, p, batches)
    assert seen == [5, 1, 7] and [o["n"] for o in out] == seen and isinstance(out, tuple)
    for o, mb in zip(out, batches, strict=True):
        assert torch.equal(o["h"], torch.tanh(mb["x"] @ p["layers"][0])) and not o["h"].requires_grad
    assert torch.is_grad_enabled()


def test_pp_forward_gives_the_loss_of_pp_forward_backward() -> None:
    p, batches = params(), microbatches()
    total = sum(pp_forward(stage, loss, p, batches))
    expected, _ = pp_forward_backward(stage, loss, p, batches)
    assert torch.equal(total.num, expected.num) and torch.equal(total.den, expected.den)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(microbatches={"x": 1}), TypeError, r"microbatches is a dict; pass a sequence, e.g. \[batch\]"),
        (dict(microbatches=torch.ones(2)), TypeError, "microbatches is a Tensor; pass a sequence"),
        (dict(microbatches=(x for x in "ab")), TypeError, "microbatches is a generator; pass a sequence"),
        (dict(microbatches=fstep.make_docs([[1, 2]])), TypeError, "microbatches is a Docs; pass a sequence"),
        (dict(microbatches=[]), ValueError, "there are no microbatches; pass at least one"),
        (dict(schedule="zb"), ValueError, "schedule 'zb' is unknown; pass one of gpipe, 1f1b"),
        (dict(axis=Axis("pp", size=2)), ValueError, "axis 'pp' has 2 ranks and no transport"),
    ],
)
@pytest.mark.parametrize("function", [pp_forward_backward, pp_forward])
def test_bad_input(function: Callable, change: dict, error: type[Exception], message: str) -> None:
    given = dict(microbatches=microbatches()) | change
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(stage, loss, params(), given.pop("microbatches"), **given)


ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda r, mb: r.num, TypeError, "loss_fn returned a Tensor; return Ratio"),
        (lambda r, mb: (r, r), TypeError, "loss_fn returned a tuple; return Ratio.*, or a pair of that and a dict"),
        (lambda r, mb: (r, {"a": ONE}), TypeError, "loss_fn returned a tuple"),
        (lambda r, mb: Ratio(mb["w"], ONE), TypeError, r"the loss is a Ratio with a part of shape \(5,\); sum it to a 0-d"),
        (lambda r, mb: Ratio(r.num, 3.0), TypeError, "the loss is a Ratio with a part of float"),
        (lambda r, mb: (r, {"size": Ratio(mb["w"], ONE)}), TypeError, r"size is a Ratio with a part of shape \(5,\)"),
        (lambda r, mb: (r, {"balance": r}), ValueError, r"\['balance'\] are names of auxiliary losses and of metrics"),
        (lambda r, mb: (r, {f"n{len(mb['w'])}": r}), ValueError, r"metrics \['balance', 'n1'\] and the first has \['bal"),
        (lambda r, mb: (r, {"a": r}) if len(mb["w"]) == 5 else r, ValueError, r"metrics \['balance'\] and the first has"),
    ],
)
@pytest.mark.parametrize("recording", [False, True])
def test_bad_loss(bad: Callable, error: type[Exception], message: str, recording: bool) -> None:
    p = params()
    p["layers"][0].requires_grad_(recording)
    with pytest.raises(error, match=f"pp_forward_backward: .*{message}"):
        pp_forward_backward(stage_aux, lambda p, x, mb: bad(loss(p, x, mb), mb), p, microbatches())


# A whole model, and mutants ------------------------------------------------------------------------------------------


def test_any_cutting_of_documents_gives_the_same_gradients() -> None:
    rope = fstep.Rope(theta=1e4, dim=4)
    config = Config(
        family="qwen3", vocab=19, dim=8, ffn=12, layers=2, heads=2, kv_heads=1, head_dim=4, rope=rope,
        windows=(0, 3), tied=True, qk_norm=True,
    )  # fmt: skip
    model = Dense(config)
    p = model.init(fstep.Key.seed(0), dtype=torch.float64)
    p = tree_map(lambda x: x + 0.1 * torch.randn_like(x), p)
    numbers = random.Random(0)
    docs = fstep.make_docs([[numbers.randrange(19) for _ in range(n)] for n in (7, 2, 1, 9, 4)])

    def loss_fn(params: Any, x: Tensor, mb: Any) -> Ratio:
        return fstep.sft_loss(model.logprobs(params, x, mb), mb.weights.double())

    whole = pp_forward_backward(model.stage(), loss_fn, p, [fstep.pack_thd(docs)])
    for cut in (dict(num=2), dict(num=7), dict(max_tokens=10)):
        parts = [fstep.pack_thd(part, multiple_of=4) for part in fstep.split_microbatches(docs, **cut)]
        got = pp_forward_backward(model.stage(), loss_fn, p, parts)
        check(got, (whole[0].num, whole[0].den, whole[1]), 1e-12)


def _times(k: float) -> Callable:
    return lambda real: lambda grads: [k * g for g in real(grads)]


def _skip_second(real: Callable) -> Callable:
    calls: list[int] = []

    def run(*args: Any) -> None:
        calls.append(1)
        if len(calls) != 2:
            real(*args)

    return run


MUTANTS: dict[str, tuple[str, Callable]] = {
    "factor 2": ("read_grads", _times(2.0)),
    "sign flip": ("read_grads", _times(-1.0)),
    "mean of microbatches": ("read_grads", _times(1 / 3)),
    "rolled leaves": ("read_grads", lambda real: lambda leaves: real([leaves[1], leaves[0], *leaves[2:]])),
    "dropped microbatch": ("backward_into", _skip_second),
    "microbatch counted twice": (
        "_run",
        lambda real: lambda s, f, p, q, mb: real(s, f, p, q, mb) if len(mb["x"]) > 1 else real(s, f, p, q, join([mb, mb])),
    ),
    "auxiliary loss ignored": (
        "_run",
        lambda real: (
            lambda s, f, p, q, mb: (lambda pair: (pair[0], {**pair[1], "balance": Ratio(ONE, ONE)}))(
                real(lambda *a: s(*a)[0], f, p, q, mb)
            )
        ),
    ),
    "auxiliary loss detached": (
        "_run",
        lambda real: (
            lambda s, f, p, q, mb: real(lambda *a: (s(*a)[0], {k: r.detach() for k, r in s(*a)[1].items()}), f, p, q, mb)
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison that the tests above rest on fails for each way of being wrong."""
    p, batches = params(), microbatches()
    expected = by_hand(p, batches, aux=True)
    check(pp_forward_backward(stage_aux, loss, p, batches), expected)
    name, change = MUTANTS[mutant]
    module = own if name == "read_grads" else pipeline
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    with pytest.raises(AssertionError, match="not close"):
        check(pp_forward_backward(stage_aux, loss, p, batches), expected)


def test_a_tied_parameter_is_there_once() -> None:
    """A loss that goes through all leaves, a penalty say, meets it once, in the caller's structure."""
    tied = {"embed": torch.arange(4.0, dtype=torch.float64), "head": Tied("embed")}
    zeros = tree_map(torch.zeros_like, tied)

    def penalty(p: Any, x: Tensor, mb: Tensor) -> Ratio:
        assert tree_map(torch.add, p, zeros).keys() == tied.keys()
        return Ratio(sum(t.square().sum() for t in tree_leaves(p)) + (x * p[p["head"].to]).sum(), ONE)

    run = lambda p, x, mb: p["embed"] * mb  # noqa: E731
    for mbs in ([ONE], [ONE, 2 * ONE]):
        loss, grads = pp_forward_backward(run, penalty, tied, mbs)
        k, e = sum(float(m) for m in mbs), tied["embed"]
        assert loss.num == (len(mbs) + k) * e.square().sum()
        assert torch.equal(grads["embed"], 2 * (len(mbs) + k) * e)
