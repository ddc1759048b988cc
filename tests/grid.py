"""One step of training on any mesh beside the same step on one rank: what the tests of the whole grid share.

The step is the one of the README: pack, cut along documents, pipeline, finalize, update. The oracle is the same function
with `Mesh()`, and whole params; nothing of a mesh's params, batches or gradients is shared between the two.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fstep
from fstep import Mesh, Ratio
from fstep_models.dense import Config, Dense

CONFIG = Config(
    family="qwen3", vocab=37, dim=16, ffn=20, layers=8, heads=4, kv_heads=2, head_dim=4,
    rope=fstep.Rope(theta=10000.0, dim=4), windows=(0, 5, 0, 0, 3, 0, 0, 0), tied=False, qk_norm=True, init_std=0.15,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained on: the lengths of the documents, which of them are masked, how many microbatches."""

    lengths: tuple[int, ...]
    microbatches: int
    masked: tuple[int, ...] = ()
    tied: bool = False
    frozen: bool = False


RAGGED = (17, 1, 6, 11, 2, 9, 5, 14, 3, 3, 8)
CASES = {
    "ragged": Case(RAGGED, 8),
    "masked": Case(RAGGED, 8, masked=(0, 3, 7)),
    "few": Case((9, 4), 2),
    "one, tied": Case((12, 5, 1), 1, tied=True),
    "tied": Case(RAGGED, 8, tied=True),
    "frozen": Case(RAGGED, 8, tied=True, frozen=True),
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev")
MESHES = [
    {"dp": dp, "pp": pp, "cp": cp, "tp": tp}
    for dp, pp, cp, tp in itertools.product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2))
    if 1 < dp * pp * cp * tp <= 8
]


def name_of(sizes: dict[str, int]) -> str:
    return " ".join(f"{k}{v}" for k, v in sizes.items() if v > 1)


@cache
def model_of(tied: bool) -> Dense:
    return Dense(replace(CONFIG, tied=tied))


@cache
def whole_params(tied: bool) -> Any:
    return model_of(tied).init(fstep.Key.seed(1), dtype=torch.float64)


def documents(case: Case) -> fstep.Docs:
    key = fstep.Key.seed(2)
    tokens = [(key.fold_in(i).uniform((n,)) * CONFIG.vocab).long() for i, n in enumerate(case.lengths)]
    weights = [
        key.fold_in(100 + i).uniform((n,), dtype=torch.float64) * (i not in case.masked) for i, n in enumerate(case.lengths)
    ]
    return fstep.make_docs(tokens, weights=weights, vocab_size=CONFIG.vocab)


def trainable(case: Case, path: str) -> bool:
    return not case.frozen or path.startswith(("layers.2", "layers.7")) or path.endswith(("norm", "embed"))


def step(
    mesh: Mesh, case: Case, *, schedule: str = "1f1b", zero: bool = False, context: str = "ring"
) -> tuple[Any, Any, dict[str, Tensor], float]:
    """Take a step; return the new params, the gradients, the metrics and the loss of an evaluation afterwards."""
    model = replace(model_of(case.tied), context=context)
    params = model.part(whole_params(case.tied), mesh=mesh, schedule=schedule)
    data = mesh.over("dp", "cp")
    if zero:
        params = fstep.shard_params(params, data)
    state = fstep.init_state(params, fstep.sgd)
    batch = [
        fstep.cp_shard(fstep.pack_thd(mb, multiple_of=2 * mesh.cp.size), axis=mesh.cp)
        for mb in fstep.split_microbatches(documents(case), num=case.microbatches, axis=mesh.dp)
    ]

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> Any:
        logp, entropy = model.logprobs(p, x, mb, mesh=mesh, entropy=True)
        loss = fstep.sft_loss(logp, mb.weights)
        return Ratio(loss.num - 0.01 * (entropy * mb.weights).sum(), loss.den), {"nll": loss}

    run: dict[str, Any] = {"axis": mesh.pp, "schedule": schedule}
    loss, grads = fstep.pp_forward_backward(
        model.stage(mesh), loss_fn, state.params, batch, trainable=lambda path: trainable(case, path), **run
    )
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=0.7)
    new = fstep.tree_map(lambda g, p: p - 0.5 * g, grads, state.params)
    full = fstep.tree_merge(new, fstep.tree_map(lambda x: x, state.params))
    ratios = fstep.pp_forward(model.stage(mesh), lambda p, x, mb: loss_fn(p, x, mb)[0], full, batch, **run)
    total = fstep.psum(sum(ratios[1:], ratios[0]), axis=data)
    return full, grads, metrics, float(total.mean())


@cache
def alone(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    params, grads, metrics, after = step(Mesh(), case)
    named = [dict(zip(fstep.tree_paths(t), fstep.tree_leaves(t), strict=True)) for t in (params, grads)]
    return named[0], named[1], metrics, after


def held(whole: Tensor, place: fstep.Place) -> Tensor:
    """Return the part of a whole tensor that a place holds."""
    part = whole[tuple(slice(a, b) for a, b in place.box)]
    return part if place.flat is None else part.reshape(-1)[slice(*place.flat)]


Held = dict[str, set[Any]]


def check_rank(rank: int, result: Any, case: Case, rtol: float = 1e-10) -> Held:
    """Assert that what a rank has is what one process has; return which parts of which gradients those are."""
    params, grads, metrics, after = alone(case)
    new, got, got_metrics, got_after = result
    for name in ("loss", "weight", "grad_norm", "nonfinite", "nll"):
        a, b = float(got_metrics[name]), float(metrics[name])
        assert abs(a - b) <= rtol * abs(b), f"rank {rank}: {name} is {a!r}, on one rank {b!r}"
    assert abs(got_after - after) <= rtol * abs(after), f"rank {rank}: evaluation gives {got_after!r}, not {after!r}"
    seen: Held = {path: set() for path in grads}
    for what, tree, wanted in (("gradient", got, grads), ("new", new, params)):
        for place, x in zip(fstep.places(tree), fstep.tree_leaves(tree), strict=True):
            want = held(wanted[place.path], place)
            # Relative to the whole leaf: a slice may be nearly zero.
            error = float((x - want).norm() / wanted[place.path].norm().clamp(min=1e-300))
            assert x.shape == want.shape and error <= rtol, f"rank {rank}: {what} {place.path} is off by {error:.1e}"
            if what == "gradient":
                seen[place.path].add((place.box, place.flat))
    return seen


def compare(sizes: dict[str, int], case: Case, rtol: float = 1e-10, **how: Any) -> None:
    """Assert that every leaf of every rank is that of one process, and that together they hold all of it."""
    results = fstep.simulate(lambda mesh: step(mesh, case, **how), **sizes)
    found = [check_rank(rank, result, case, rtol) for rank, result in enumerate(results)]
    for path, whole in alone(case)[1].items():
        parts = set().union(*(seen[path] for seen in found))
        together = sum(_size(box) if flat is None else flat[1] - flat[0] for box, flat in parts)
        assert together == whole.numel(), f"{path}: ranks hold {together} of {whole.numel()} elements"


def _size(box: tuple[tuple[int, int], ...]) -> int:
    size = 1
    for a, b in box:
        size *= b - a
    return size
