"""A small model of layers for the tests of ZeRO, the plain step to compare with, and a transport that keeps a diary."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fstep
from fstep import Axis, Key, Mesh

LAYERS, DIM, WIDE, VOCAB = 4, 5, 9, 7


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Sizes that no number of ranks divides: 35, 45, 5, 45."""
    shapes: dict[str, Any] = {"embed": (VOCAB, DIM), "head": (VOCAB, DIM), "norm": (DIM,)}
    shapes["layers"] = {i: {"up": (WIDE, DIM), "down": (DIM, WIDE), "norm": (DIM,)} for i in range(LAYERS)}

    def draw(tree: Any, key: Key) -> Any:
        if isinstance(tree, dict):
            return {k: draw(v, key.fold_in(n)) for n, (k, v) in enumerate(tree.items())}
        return key.normal(tree, dtype=torch.float64).to(dtype) * 0.5 + (len(tree) == 1)

    return draw(shapes, Key.seed(4))


def block(i: int, layer: Any, x: Tensor) -> Tensor:
    h = fstep.rms_norm(x, layer["norm"], eps=1e-6)
    return x + fstep.linear(torch.tanh(fstep.linear(h, layer["up"]) * (i + 1) ** -0.5), layer["down"])


def stage(params: Any, x: Any, mb: Tensor, f: Callable[..., Any] = block) -> Tensor:
    """Run whatever parts the params have; a layer is whole while f runs."""
    if x is None:
        x = fstep.embed(mb, fstep.gather_params(params["embed"]))
    return fstep.fold_layers(f, params.get("layers", {}), x)


def loss_fn(params: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
    hidden = fstep.rms_norm(x, fstep.gather_params(params["norm"]), eps=1e-6)
    logp = fstep.token_logprobs(hidden, fstep.gather_params(params["head"]), mb.roll(-1))
    return fstep.Ratio(-logp.sum(), torch.tensor(float(len(mb)), dtype=x.dtype))


def tokens(rank: int, num: int = 1) -> list[Tensor]:
    """A rank's microbatches, of different lengths."""
    return [Key.seed(9).fold_in(rank).fold_in(i).permutation(VOCAB)[: 3 + (rank + i) % 4] for i in range(num)]


def data_axis(mesh: Mesh) -> Axis:
    return mesh.over("dp", "cp")


def run_steps(
    mesh: Mesh,
    shard: Callable[[Any], Any] = lambda params: params,
    *,
    num: int = 1,
    outside: bool = False,
    optimizer: Any = fstep.adamw,
    donate: bool = False,
    steps: int = 3,
    f: Callable[..., Any] = block,
    trainable: Callable[[str], bool] | None = None,
    max_norm: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Any, dict[str, Tensor]]:
    """Take steps; return whole params, the last whole gradients, and metrics."""
    state = fstep.init_state(shard(make_params(dtype)), optimizer, trainable=trainable)
    batch = tokens(data_axis(mesh).rank, num)

    def run(params: Any, x: Any, mb: Tensor) -> Tensor:
        return stage(params, x, mb, f)

    for step in range(steps):
        params = fstep.gather_params(state.params) if outside else state.params
        loss, grads = fstep.pp_forward_backward(run, loss_fn, params, batch, trainable=trainable)
        if outside:
            grads = fstep.scatter_grads(grads, state.params)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=max_norm)
        skip = metrics["nonfinite"]
        state = optimizer.update(state, grads, lr=0.1 / (step + 1), skip=skip, donate=donate)
    return fstep.unshard_params(state.params), fstep.unshard_params(grads), metrics


def assert_same_bits(got: Any, expected: Any) -> None:
    assert fstep.tree_paths(got) == fstep.tree_paths(expected)
    for path, a, b in zip(fstep.tree_paths(got), fstep.tree_leaves(got), fstep.tree_leaves(expected), strict=True):
        assert torch.equal(a, b), path


class Diary:
    """The transport of an axis, with a record of what is called, and how many gathers have a result, or will, in memory."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: list[tuple[str, int]] = []  # name, elements sent
        self.gathers: list[Gather] = []
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def alive(self) -> int:
        return sum(gather.memory() is not None for gather in self.gathers)

    def note(self, name: str, n: int = 0) -> None:
        self.calls.append((name, n))
        self.most = max(self.most, self.alive())

    def all_gather(self, x: Tensor, *, action: str) -> Any:
        pending = Watched(self, self.inner.all_gather(x, action=action), Gather())
        pending.gather.memory = weakref.ref(pending)
        self.gathers.append(pending.gather)
        self.note("gather", x.numel())
        return pending

    def reduce_scatter(self, x: Tensor, *, action: str) -> Any:
        self.note("sum", x.numel())
        return Summing(self, self.inner.reduce_scatter(x, action=action))


@dataclasses.dataclass(eq=False)
class Gather:
    """``memory`` knows whether what was gathered, or before that the order to gather, is still held by anyone."""

    memory: Any = None


@dataclasses.dataclass(eq=False)
class Watched:
    diary: Diary
    inner: Any
    gather: Gather

    def wait(self) -> Tensor:
        out: Tensor = self.inner.wait()
        self.gather.memory = weakref.ref(out.untyped_storage())
        self.diary.note("gathered")
        return out


@dataclasses.dataclass(eq=False)
class Summing:
    diary: Diary
    inner: Any

    def wait(self) -> Tensor:
        self.diary.note("summed")
        out: Tensor = self.inner.wait()
        return out


def with_diary(axis: Axis) -> tuple[Axis, Diary]:
    diary = Diary(axis.transport)
    return dataclasses.replace(axis, transport=diary), diary
