"""A pipeline over several ranks beside one process: the same microbatches, the same bits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fstep
from fstep import Action, Copied, Mesh, MeshError, Ratio, Schedule, Stages, Tied
from fstep.grad.by_name import NAMED
from fstep.testing import assert_trees_close
from fstep.tree import tree_leaves, tree_paths
from tests.grad.test_pipeline_traffic import most_held

DIM, LAYERS, VOCAB = 6, 8, 11
Params = dict[str, Any]


def whole(tied: bool = False) -> Params:
    """A model of 8 layers of two weights, a bias and a scale that some operation uses twice."""
    key = fstep.Key.seed(3)

    def draw(i: int, *shape: int) -> Tensor:
        return key.fold_in(i).normal(shape, dtype=torch.float64) * 0.4

    layers = {
        i: {"a": draw(4 * i, DIM, DIM), "b": draw(4 * i + 1, DIM), "c": draw(4 * i + 2, DIM, DIM), "s": draw(4 * i + 3, DIM)}
        for i in range(LAYERS)
    }
    head = Tied("embed") if tied else draw(101, VOCAB, DIM)
    return {"embed": draw(100, VOCAB, DIM), "layers": layers, "head": head, "steps": torch.tensor(3)}


def batches(sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    key = fstep.Key.seed(5)
    out = []
    for i, n in enumerate(sizes):
        tokens = (key.fold_in(i).uniform((n,)) * VOCAB).long()
        weights = key.fold_in(50 + i).uniform((n,), dtype=torch.float64) * (i != 1)  # microbatch 1 is masked
        out.append({"tokens": tokens, "labels": tokens.flip(0), "weights": weights})
    return out


def layer(p: Params, h: Tensor) -> Tensor:
    return h + torch.tanh(h @ p["a"].T + p["b"]) @ p["c"] * p["s"] + 0.1 * p["s"]


def stage(params: Params, x: Any, mb: Any, run: Callable[[Params, Tensor], Tensor] = layer) -> dict[str, Any]:
    """Embed if nothing was sent, then run the layers that are there; the payload is a tree with an integer tensor."""
    if x is None:
        x = {"h": params["embed"][mb["tokens"]], "count": torch.zeros((), dtype=torch.int64), "note": "hello"}
    h, count = x["h"], x["count"]
    for i in sorted(params.get("layers", {})):
        h = run(params["layers"][i], h)
        count = count + 1
    return {"h": h, "count": count, "note": x["note"]}


def stage_aux(params: Params, x: Any, mb: Any) -> tuple[Any, dict[str, Ratio]]:
    """Like `stage`, and every layer adds to an auxiliary loss of its weights and of what it returns."""
    weight, total = mb["weights"].sum(), torch.zeros((), dtype=torch.float64)
    out = stage({**params, "layers": {}}, x, mb)
    for i in sorted(params.get("layers", {})):
        out = stage({"layers": {i: params["layers"][i]}}, out, mb)
        total = total + weight * params["layers"][i]["a"].square().sum() + out["h"].pow(4).sum()
    return out, {"size": Ratio(0.01 * total, weight)}


def loss(params: Params, x: Any, mb: Any) -> tuple[Ratio, dict[str, Ratio]]:
    assert int(x["count"]) == LAYERS and x["note"] == "hello"
    head = params[params["head"].to] if isinstance(params["head"], Tied) else params["head"]
    logp = (x["h"] @ head.T).log_softmax(-1).gather(-1, mb["labels"][:, None])[:, 0]
    weight = mb["weights"].sum()
    return Ratio(-(logp * mb["weights"]).sum(), weight), {"top": Ratio(logp.detach().sum(), torch.tensor(1.0))}


def part(params: Params, rank_of: tuple[int, ...], mesh: Mesh) -> Any:
    """Cut the model for this rank: embedding first, head last, layers in between."""
    stages, last, rank = len(rank_of), len(rank_of) - 1, mesh.pp.rank
    parts: dict[int, Params] = {}
    for s in (s for s in range(stages) if rank_of[s] == rank):
        chosen = range(s * LAYERS // stages, (s + 1) * LAYERS // stages)
        parts[s] = {"layers": {i: params["layers"][i] for i in chosen}}
        if s == 0:
            parts[s] |= {"embed": params["embed"], "steps": params["steps"]}
        if s == last:
            parts[s]["head"] = params["head"]
    if isinstance(params["head"], Tied) and rank_of[0] != rank_of[last] and rank in (rank_of[0], rank_of[last]):
        own = parts[0] if rank == rank_of[0] else parts[last]
        own["embed"] = Copied(params["embed"], mesh.pp, tuple(sorted((rank_of[0], rank_of[last]))))
    return parts[next(iter(parts))] if len(parts) == 1 else Stages(parts)


def bare_stage(fn: Callable) -> Callable:
    return lambda params, x, mb: fn(fstep.bare(params), x, mb)


def gradients(results: list[Any]) -> dict[str, Tensor]:
    """Put the ranks' gradients together by name; copies are added."""
    out: dict[str, Tensor] = {}
    for _, grads in results:
        for path, g in zip(tree_paths(grads), tree_leaves(grads), strict=True):
            out[path] = out[path] + g if path in out else g
    return out


def alone(params: Params, mbs: list[Any], stage_fn: Callable = stage) -> tuple[Any, dict[str, Tensor]]:
    value, grads = fstep.pp_forward_backward(stage_fn, loss, params, mbs)
    return value, dict(zip(tree_paths(grads), tree_leaves(grads), strict=True))


def pipelined(
    schedule: Any, ranks: int, params: Params, mbs: list[Any], stage_fn: Callable = stage, **more: Any
) -> list[Any]:
    def run(mesh: Mesh) -> Any:
        own = part(params, fstep.stage_ranks(schedule, ranks), mesh)
        fns = bare_stage(stage_fn), bare_stage(loss)
        return fstep.pp_forward_backward(*fns, own, mbs, axis=mesh.pp, schedule=schedule, **more)

    return fstep.simulate(run, pp=ranks)


RAGGED = (5, 3, 9, 1, 4, 2, 7, 6)
CASES = [
    (name, ranks, sizes)
    for name in NAMED
    for ranks in (1, 2, 4)
    for sizes in (RAGGED, RAGGED[:3], RAGGED[:1])
    if not (name == "dualpipev" and len(sizes) < 2 * ranks)
]


@pytest.mark.parametrize(("schedule", "ranks", "sizes"), CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_pipeline_is_one_process_to_the_bit(schedule: str, ranks: int, sizes: tuple[int, ...], tied: bool) -> None:
    params, mbs = whole(tied), batches(sizes)
    (want, metrics), want_grads = alone(params, mbs)
    results = pipelined(schedule, ranks, params, mbs)
    for (got, got_metrics), _ in results:
        assert torch.equal(got.num, want.num) and torch.equal(got.den, want.den)
        assert torch.equal(got_metrics["top"].num, metrics["top"].num)
    grads = gradients(results)
    assert grads.keys() == want_grads.keys()
    for path, g in grads.items():
        assert torch.equal(g, want_grads[path]), path
    assert float(want_grads["layers.3.s"].abs().sum()) > 0


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_zero_bubble"])
def test_tied_head_and_auxiliary_losses(schedule: str) -> None:
    params, mbs = whole(tied=True), batches(RAGGED)
    (want, metrics), want_grads = alone(params, mbs, stage_aux)
    results = pipelined(schedule, 4, params, mbs, stage_aux)
    for (got, got_metrics), _ in results:
        assert_trees_close({"loss": got, **got_metrics}, {"loss": want, **metrics}, rtol=1e-12, atol=1e-12)
    assert_trees_close(gradients(results), want_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", list(NAMED))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_in_between_changes_nothing(schedule: str, ranks: int) -> None:
    params, mbs = whole(), batches(RAGGED)

    def logps(params: Params, x: Any, mb: Any) -> dict[str, Any]:
        return {"logp": (x["h"] @ params["head"].T).log_softmax(-1)[:, 0], "loss": loss(params, x, mb)[0], "n": 3}

    want = fstep.pp_forward(stage, logps, params, mbs)

    def run(mesh: Mesh) -> Any:
        own = part(params, fstep.stage_ranks(schedule, ranks), mesh)
        train: dict[str, Any] = {"axis": mesh.pp, "schedule": schedule}
        first = fstep.pp_forward_backward(stage, loss, own, mbs, **train)
        scores = (
            fstep.pp_forward(stage, logps, own, mbs[:3] if ranks < 3 else mbs, **train) if schedule != "dualpipev" else None
        )
        scores = fstep.pp_forward(stage, logps, own, mbs, **train)
        second = fstep.pp_forward_backward(stage, loss, own, mbs, **train)
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b)
        return scores

    for got in fstep.simulate(run, pp=ranks):
        assert len(got) == len(mbs)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a["logp"], b["logp"]) and torch.equal(a["loss"].num, b["loss"].num) and a["n"] == 3
            assert not a["logp"].requires_grad


def test_a_table_of_ones_own() -> None:
    """Any order that can run gives the same gradients: here all backward halves of weights come at the very end."""

    def lazy(ranks: int, microbatches: int) -> Schedule:
        rows = []
        for r in range(ranks):
            acts = [Action("F", r, m) for m in range(microbatches)]
            acts += [Action("I", r, m) for m in range(microbatches)] + [Action("W", r, m) for m in range(microbatches)]
            rows.append(tuple(acts))
        return Schedule("lazy", tuple(range(ranks)), microbatches, tuple(rows))

    params, mbs = whole(), batches(RAGGED)
    _, want = alone(params, mbs)
    for schedule in (lazy, lazy(2, len(mbs))):
        got = gradients(pipelined(schedule, 2, params, mbs))
        assert all(torch.equal(got[path], want[path]) for path in want)


def test_frozen_stages_and_leaves() -> None:
    params, mbs = whole(), batches(RAGGED[:4])

    def trainable(path: str) -> bool:
        return path.startswith(("layers.6", "layers.3.b"))  # nothing of the first stage of four

    _, want = fstep.pp_forward_backward(stage, loss, params, mbs, trainable=trainable)
    results = pipelined("zbv", 4, params, mbs, trainable=trainable)
    got = gradients(results)
    assert sorted(got) == sorted(tree_paths(want)) and len(got) == 5
    assert all(torch.equal(got[p], g) for p, g in zip(tree_paths(want), tree_leaves(want), strict=True))


def test_half_precision_payloads() -> None:
    """What is sent arrives with its own dtype: nothing is widened on the way."""
    params, mbs = fstep.cast(whole(), torch.bfloat16), batches(RAGGED[:4])
    mbs = [{**mb, "weights": mb["weights"].to(torch.bfloat16)} for mb in mbs]
    _, want = alone(params, mbs)
    got = gradients(pipelined("1f1b", 2, params, mbs))
    assert all(torch.equal(got[path], want[path]) and got[path].dtype == torch.bfloat16 for path in want)


def test_params_stay_as_they_were() -> None:
    params, mbs = whole(), batches(RAGGED[:4])
    before = fstep.tree_map(lambda x: (x.clone(), x._version), params)
    pipelined("zbv", 2, params, mbs)
    for x, (y, version) in zip(tree_leaves(params), [b for b in _pairs(before)], strict=True):
        assert torch.equal(x, y) and x._version == version and x.grad is None and not x.requires_grad


def _pairs(tree: Any) -> list[tuple[Tensor, int]]:
    leaves = tree_leaves(tree)
    return list(zip(leaves[::2], leaves[1::2], strict=True))


# What goes wrong says so, on every rank.


def test_a_stage_that_raises_takes_the_others_with_it() -> None:
    def broken(params: Params, x: Any, mb: Any) -> Any:
        if 5 in params["layers"] and len(mb["tokens"]) == 9:
            raise ArithmeticError("no luck")
        return stage(params, x, mb)

    with pytest.raises(ArithmeticError, match="no luck"):
        pipelined("1f1b", 4, whole(), batches(RAGGED), broken)


def test_what_a_rank_waited_for_when_another_left() -> None:
    def run(mesh: Mesh) -> Any:
        if mesh.pp.rank == 1:
            return None
        own = part(whole(), (0, 1), mesh)
        return fstep.pp_forward_backward(stage, loss, own, batches(RAGGED), axis=mesh.pp)

    with pytest.raises(MeshError, match=r"(?s)(recv|send).*over 'pp'.*rank 1 \(pp 1\) has returned"):
        fstep.simulate(run, pp=2)


@pytest.mark.parametrize(
    ("schedule", "own", "message"),
    [
        (
            "zbv",
            lambda p, mesh: p,
            r"'zbv' gives rank 0 the stages 0, 3, and params is a dict; pass Stages\(\{0: ..., ...\}\)",
        ),
        ("zbv", lambda p, mesh: part(p, (0, 1, 0, 1), mesh), r"params are Stages \[0, 2\].* the stages \[0, 3\]"),
        ("1f1b", lambda p, mesh: Stages({0: {"head": Tied("embed")}}), "tied to 'embed', which this rank has not"),
        (fstep.gpipe(2, 5), lambda p, mesh: p, "'gpipe' is for 2 ranks and 5 microbatches, and there are 2 and 8"),
        (lambda p, m: 3, lambda p, mesh: p, "what schedule returned is a int; pass a function that returns a Schedule"),
    ],
)
def test_params_that_do_not_fit_the_schedule(schedule: Any, own: Callable, message: str) -> None:
    def run(mesh: Mesh) -> Any:
        return fstep.pp_forward_backward(stage, loss, own(whole(), mesh), batches(RAGGED), axis=mesh.pp, schedule=schedule)

    with pytest.raises((ValueError, TypeError), match=message):
        fstep.simulate(run, pp=2)


def test_names_of_metrics_and_auxiliary_losses_may_not_meet() -> None:
    def clash(params: Params, x: Any, mb: Any) -> Any:
        return stage(params, x, mb), {"top": Ratio(torch.zeros(()), torch.zeros(()))}

    with pytest.raises(ValueError, match=r"\['top'\] are names of auxiliary losses and of metrics"):
        pipelined("1f1b", 2, whole(), batches(RAGGED[:2]), clash)


def test_an_outer_derivative_is_refused() -> None:
    params = fstep.tree_map(lambda x: x.requires_grad_() if x.is_floating_point() else x, whole())
    with pytest.raises(ValueError, match=r"pp_forward_backward: params or microbatches require grad, .* a pipeline of 2"):
        pipelined("1f1b", 2, params, batches(RAGGED[:2]))


@pytest.mark.parametrize("name", list(NAMED))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_few_messages_are_held(name: str, ranks: int) -> None:
    """An evaluation over many microbatches holds a handful of outputs, and training no more than its peak."""
    table = NAMED[name](ranks, 4 * ranks)
    assert most_held(table.forward_only()) <= ranks + 2
    assert most_held(table) <= 2 * ranks + 2


@pytest.mark.parametrize("schedule", [s for s in NAMED if s != "gpipe"])
def test_rematerialised_stages_are_computed_twice_and_no_more(schedule: str) -> None:
    """Whatever the schedule makes of the backward pass, a block runs once forward and once more."""
    params, mbs = whole(), batches(RAGGED[:4])
    (want, _), want_grads = alone(params, mbs)
    calls: list[int] = []

    def block(p: Params, h: Tensor) -> Tensor:
        calls.append(1)
        return layer(p, h)

    results = pipelined(schedule, 2, params, mbs, partial(stage, run=fstep.remat(block)))
    assert len(calls) == 2 * LAYERS * len(mbs)
    assert all(torch.equal(got.num, want.num) for (got, _), _ in results)
    got = gradients(results)
    assert all(torch.equal(got[path], want_grads[path]) for path in want_grads)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_compiled_stages(schedule: str) -> None:
    params, mbs = whole(), batches((5, 5, 5, 5))
    _, want = alone(params, mbs)
    torch.compiler.reset()

    compiled = partial(stage, run=torch.compile(layer, backend="aot_eager"))
    assert_trees_close(gradients(pipelined(schedule, 2, params, mbs, compiled)), want, rtol=1e-12, atol=1e-14)


def test_an_evaluation_may_have_fewer_microbatches_than_training() -> None:
    params, mbs = whole(), batches((5,))
    want = fstep.pp_forward(stage, lambda p, x, mb: x["h"], params, mbs)

    def run(mesh: Mesh) -> Any:
        own = part(params, fstep.stage_ranks("dualpipev", 2), mesh)
        return fstep.pp_forward(stage, lambda p, x, mb: x["h"], own, mbs, axis=mesh.pp, schedule="dualpipev")

    assert all(torch.equal(got[0], want[0]) for got in fstep.simulate(run, pp=2))


def test_a_predicate_that_chooses_nothing_anywhere_says_so() -> None:
    with pytest.raises(ValueError, match="no rank has a leaf that is trainable"):
        pipelined("1f1b", 2, whole(), batches(RAGGED[:2]), trainable=lambda path: "lora" in path)


def test_ranks_with_different_microbatches_say_so() -> None:
    def run(mesh: Mesh) -> Any:
        own = part(whole(), (0, 1), mesh)
        return fstep.pp_forward_backward(stage, loss, own, batches(RAGGED[: 2 + mesh.pp.rank]), axis=mesh.pp)

    with pytest.raises(
        ValueError, match=r"rank 0 of axis 'pp' sends microbatch 0 of 2 .* and rank 1 expects microbatch 0 of 3"
    ):
        fstep.simulate(run, pp=2)


def test_a_function_that_makes_schedules_is_not_kept() -> None:
    class Something:
        pass

    held = Something()
    seen = weakref.ref(held)

    def table(ranks: int, number: int, held: Something = held) -> Schedule:
        return fstep.one_f_one_b(ranks, number)

    pipelined(table, 2, whole(), batches(RAGGED[:2]))
    del held, table
    gc.collect()
    assert seen() is None
