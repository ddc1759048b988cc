"""What both sides of pipeline.py run: layers of a Llama, as a stage function for us and as a module for torch's pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import on_gpu
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional as F

import fstep

Params = dict[str, Tensor]
Layers = dict[int, Params]
HALVES = partial(fstep.interleaved_zero_bubble, stages=1)


@dataclass(frozen=True)
class Race:
    """A schedule of ours and the peer's, and whether the peer can run compiled blocks with it."""

    name: str
    ours: Any
    theirs: str
    compiled: bool = True
    extra: bool = False  # raced for the first number of microbatches only


RACES = (
    Race("1f1b", "1f1b", "Schedule1F1B"),
    Race("interleaved", "interleaved", "ScheduleInterleaved1F1B"),
    Race("zbv", "zbv", "ScheduleZBVZeroBubble", compiled=False),
    Race("one stage a rank, halves", HALVES, "Schedule1F1B", extra=True),
    Race("interleaved_zero_bubble", "interleaved_zero_bubble", "ScheduleInterleavedZeroBubble", compiled=False, extra=True),
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the layers, and of a microbatch: ``tokens`` in documents of ``doc`` tokens."""

    dim: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    tokens: int
    doc: int
    dtype: torch.dtype

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's parameters."""
        d, kv = self.dim, self.dim // self.heads * self.kv_heads
        square = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        return {"n1": (d,), "n2": (d,), **square, "gate": (self.ffn, d), "up": (self.ffn, d), "down": (d, self.ffn)}


def block(p: Params, x: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, doc: int, heads: int) -> Tensor:
    """Run one decoder layer on documents of ``doc`` tokens laid end to end, [tokens, dim]."""
    h = fstep.rms_norm(x, p["n1"], eps=1e-5)
    q, k, v = (fstep.linear(h, p[n]).view(len(h), -1, x.shape[1] // heads) for n in "qkv")
    q, k = fstep.rotate(q, cos, sin), fstep.rotate(k, cos, sin)
    x = x + fstep.linear(fstep.packed_attention(q, k, v, cu, max_seqlen=doc).flatten(1), p["o"])
    h = fstep.rms_norm(x, p["n2"], eps=1e-5)
    return x + fstep.linear(F.silu(fstep.linear(h, p["gate"])) * fstep.linear(h, p["up"]), p["down"])


class Work:
    """What all sides share: weights, microbatches, the block's other arguments, and how it is compiled."""

    def __init__(self, shape: Shape, number: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        s, half = shape, shape.dim // shape.heads // 2
        angles = (torch.arange(s.tokens) % s.doc)[:, None] * 5e5 ** (-torch.arange(half) / half)
        cu = torch.arange(0, s.tokens + 1, s.doc, dtype=torch.int32)
        self.rest = (angles.cos().to(device, s.dtype), angles.sin().to(device, s.dtype), cu.to(device), s.doc, s.heads)
        key = fstep.Key.seed(1)
        self.data = [self.draw(key.fold_in(i), (2, s.tokens, s.dim)) for i in range(number)]
        self.compile: Callable[..., Any] = partial(
            torch.compile, fullgraph=True, backend="inductor" if on_gpu() else "aot_eager"
        )
        self.ours = fstep.split_weights(block, through=self.compile)
        self.compiled = self.compile(block)
        self.loss = self.compile(loss_of)

    def draw(self, key: fstep.Key, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        """Draw normal numbers, the same on every rank."""
        g = torch.Generator(device=self.device).manual_seed(int(key.fold_in(0).uniform((1,)).item() * 2**31))
        return torch.randn(shape, generator=g, device=self.device, dtype=self.shape.dtype) * scale

    def layers(self, which: range) -> Layers:
        """Draw the parameters of some layers."""
        key = fstep.Key.seed(2)
        names = self.shape.weights.items()
        return {
            i: {
                n: self.draw(key.fold_in(100 * i + j), size, 0.02 if on_gpu() else 0.3) if len(size) > 1 else self.ones(size)
                for j, (n, size) in enumerate(names)
            }
            for i in which
        }

    def ones(self, size: tuple[int, ...]) -> Tensor:
        """Return ones."""
        return torch.ones(size, device=self.device, dtype=self.shape.dtype)

    def run(self, layers: Any, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
        """Run layers one after the other."""
        for i in sorted(layers, key=int):
            x = f(layers[i], x, *self.rest)
        return x


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error, at least in float32."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return F.mse_loss(y.to(wide), target.to(wide))


def cut(work: Work, ours: Any, p: int, rank: int) -> tuple[int, dict[int, range]]:
    """Return the number of stages, and the layers of this rank's."""
    where = fstep.stage_ranks(ours, p)
    each = work.shape.layers // len(where)
    return len(where), {s: range(s * each, (s + 1) * each) for s, r in enumerate(where) if r == rank}


def fstep_side(work: Work, race: Race, number: int, mesh: fstep.Mesh) -> Callable[[], dict[int, Params]]:
    """Return a step of fstep: gradients of this rank's layers."""
    _, stages = cut(work, race.ours, mesh.pp.size, mesh.pp.rank)
    parts = {s: {"layers": work.layers(which)} for s, which in stages.items()}
    params = fstep.Stages(parts) if len(parts) > 1 else next(iter(parts.values()))
    microbatches = work.data[:number]
    # A name's table is kept from step to step; a function would be asked for one in every step.
    schedule = race.ours(mesh.pp.size, number) if callable(race.ours) else race.ours

    def stage_fn(p: Any, x: Tensor | None, mb: Tensor) -> Tensor:
        return work.run(p["layers"], mb[0] if x is None else x, work.ours)

    def loss_fn(p: Any, x: Tensor, mb: Tensor) -> fstep.Ratio:
        return fstep.Ratio(work.loss(x, mb[1]), torch.ones((), device=x.device))

    def step() -> dict[int, Params]:
        _, grads = fstep.pp_forward_backward(stage_fn, loss_fn, params, microbatches, axis=mesh.pp, schedule=schedule)
        found = grads.parts.values() if isinstance(grads, fstep.Stages) else [grads]
        return {i: layer for part in found for i, layer in part["layers"].items()}

    return step


class Stage(nn.Module):
    """The peer's stage: the same layers as parameters of a module."""

    def __init__(self, work: Work, which: range, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.work, self.f = work, f
        self.layers = nn.ModuleDict({str(i): nn.ParameterDict(p) for i, p in work.layers(which).items()})

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        return self.work.run({i: dict(layer.items()) for i, layer in self.layers.items()}, x, self.f)  # type: ignore[operator]


def torch_side(work: Work, race: Race, number: int, mesh: fstep.Mesh) -> Callable[[], dict[int, Params]]:
    """Return a step of torch.distributed.pipelining: gradients of this rank's layers."""
    count, stages = cut(work, race.ours, mesh.pp.size, mesh.pp.rank)
    if not on_gpu():
        # It sends itself a message to connect, which gloo cannot.
        pipelining.PipelineStage._get_init_p2p_neighbors_ops = lambda self: []  # type: ignore[method-assign]
    s = work.shape
    modules = {i: Stage(work, which, work.compiled if race.compiled else block) for i, which in stages.items()}

    def like(wants_grad: bool) -> tuple[Tensor]:
        return (torch.empty(s.tokens, s.dim, dtype=s.dtype, device="meta", requires_grad=wants_grad),)

    pipe = [
        pipelining.PipelineStage(m, i, count, work.device, input_args=like(i > 0), output_args=like(True))
        for i, m in sorted(modules.items())
    ]
    make: Any = getattr(pipelining, race.theirs)
    # Given the mean of microbatches to divide by, it would go over all gradients once more.
    loss = work.loss if race.compiled else loss_of
    schedule = make(pipe if len(pipe) > 1 else pipe[0], number, loss_fn=loss, scale_grads=False)
    x, y = (torch.cat([mb[k] for mb in work.data[:number]]) for k in (0, 1))

    def step() -> dict[int, Params]:
        for module in modules.values():
            module.zero_grad()
        given = (x,) if 0 in modules else ()
        schedule.step(*given, target=y if count - 1 in modules else None, losses=[], return_outputs=False)
        layers: dict[str, Any] = {i: layer for m in modules.values() for i, layer in m.layers.items()}
        return {int(i): {n: w.grad for n, w in layer.items()} for i, layer in layers.items()}

    return step


def alone(work: Work, f: Callable[..., Tensor]) -> Callable[[int], Layers]:
    """Return what adds up gradients of the whole model over so many microbatches in one process, and over those before."""
    layers = work.layers(range(work.shape.layers))
    leaves = [x.requires_grad_() for x in fstep.tree_leaves(layers)]

    def step(number: int) -> Layers:
        for mb in work.data[:number]:
            (loss_of if f is block else work.loss)(work.run(layers, mb[0], f), mb[1]).backward()
        return fstep.tree_replace_leaves(layers, [x.grad for x in leaves])

    return step
