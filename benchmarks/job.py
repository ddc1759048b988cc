"""One training job that several sides do: the same decoder, first weights and documents, AdamW, gradients clipped to norm 1.

    Job ──► fstep                      step() -> (loss, norm of the gradients before they were clipped)
        ──► a loop by hand             grads() -> {path: gradient}, as clipped, of the last step; for comparison
        ──► torchtitan, transformers   paths are those of a `Dense`: layers.3.q

A side takes the params as the job draws them, and holds them in its own form under its own names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fstep
from fstep.tree import tree_leaves, tree_paths
from fstep_models.dense import Config, Dense

Step = Callable[[], tuple[Tensor, Tensor]]
Named = dict[str, Tensor]
Turn = Callable[[Tensor], Tensor]
BETAS, EPS = fstep.adamw.betas, fstep.adamw.eps


def llama(dim: int, ffn: int, heads: int, layers: int, vocab: int = 128256, kv_heads: int = 8) -> Config:
    """Return a Llama 3's config, embedding and head apart."""
    return Config(
        family="llama", vocab=vocab, dim=dim, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=dim // heads, rope=fstep.Rope(theta=500000.0, dim=dim // heads), windows=(0,) * layers,
    )  # fmt: skip


def qwen(dim: int, ffn: int, heads: int, layers: int, vocab: int = 151936, kv_heads: int = 8) -> Config:
    """Return a Qwen3's config: normed queries and keys, the head is the embedding."""
    return dataclasses.replace(
        llama(dim, ffn, heads, layers, vocab, kv_heads),
        family="qwen3", rope=fstep.Rope(theta=1000000.0, dim=dim // heads), qk_norm=True, tied=True,
    )  # fmt: skip


SHAPES = {
    "1.7b": qwen(2048, 6144, 16, 28),  # Qwen3-1.7B
    "3b": llama(3072, 8192, 24, 28),  # Llama-3.2-3B, but for its tied head: 3.6e9 params
    "8b": llama(4096, 14336, 32, 16),  # half the layers of Llama-3-8B: 32 do not fit beside float32 moments on one GPU
    "small-qwen": dataclasses.replace(qwen(32, 96, 4, 2, vocab=61, kv_heads=2), init_std=0.1),
    "small-llama": dataclasses.replace(llama(32, 96, 4, 2, vocab=61, kv_heads=2), init_std=0.1),
}


def shape(name: str, layers: int | None = None) -> Config:
    """Return one of `SHAPES`, with another number of layers perhaps."""
    config = SHAPES[name]
    return config if layers is None else dataclasses.replace(config, layers=layers, windows=(0,) * layers)


@dataclass(frozen=True)
class Job:
    """What is trained, and how; ``master`` is what params and moments are kept in, ``low`` what is computed in."""

    config: Config
    device: str
    master: torch.dtype = torch.float32
    low: torch.dtype = torch.bfloat16
    remat: str = "none"
    backend: str | None = "inductor"  # of torch.compile; None: nothing is compiled
    lr: float = 1e-5
    keep: bool = False  # the gradients of each step

    @property
    def model(self) -> Dense:
        """Fstep's model."""
        low = None if self.low == self.master else self.low
        return Dense(self.config, dtype=low, remat=self.remat, compile=self.backend == "inductor")

    def params(self) -> Any:
        """Draw the first weights, the same ones every time."""
        return Dense(self.config).init(fstep.Key.seed(0), dtype=self.master, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which modules with params in ``master`` compute in ``low``."""
        return torch.autocast(self.device, dtype=self.low, enabled=self.low != self.master)

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function, or a module."""
        return f if self.backend is None else torch.compile(f, backend=self.backend, fullgraph=True)


def flops(config: Config, lengths: Sequence[int]) -> float:
    """Count the operations of a step's matrix products and of causal attention, forward and backward; none twice."""
    c, tokens = config, sum(lengths)
    layer = c.dim * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.dim * c.ffn
    seen = sum(n * n for n in lengths)
    return 6.0 * tokens * (c.layers * layer + c.vocab * c.dim) + 6.0 * c.layers * seen * c.heads * c.head_dim


def same(x: Tensor) -> Tensor:
    """Return x: most weights are written alike everywhere."""
    return x


@dataclass
class Names:
    """A module's parameters by a `Dense`'s paths, and how a weight there is written here (and a gradient read back)."""

    table: dict[str, nn.Parameter]
    write: Mapping[str, Turn] = field(default_factory=dict)
    read: Mapping[str, Turn] = field(default_factory=dict)

    def load(self, params: Any) -> None:
        """Write the weights into the module."""
        given = dict(zip(tree_paths(params), tree_leaves(params), strict=True))
        if given.keys() != self.table.keys():
            raise ValueError(f"these parameters differ: {sorted(given.keys() ^ self.table.keys())}")
        with torch.no_grad():
            for path, x in given.items():
                self.table[path].copy_(self.write.get(path, same)(x))

    def grads(self) -> Named:
        """Read the gradients."""
        found = {path: p.grad for path, p in self.table.items()}
        return {path: self.read.get(path, same)(g).clone() for path, g in found.items() if g is not None}


def optimizer(job: Job, names: Names) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, with fstep's defaults."""
    return torch.optim.AdamW(names.table.values(), lr=job.lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def module_step(job: Job, names: Names, backward: Callable[[], Tensor]) -> tuple[Step, Callable[[], Named]]:
    """Return the step of a module: ``backward`` accumulates the gradients of the mean loss and returns it."""
    opt, kept = optimizer(job, names), Named()

    def step() -> tuple[Tensor, Tensor]:
        loss = backward()
        norm = nn.utils.clip_grad_norm_(names.table.values(), 1.0, foreach=True)
        if job.keep:
            kept.update(names.grads())
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss, norm

    return step, lambda: dict(kept)


def by_fstep(job: Job, rows: Callable[[], Sequence[fstep.Packed]]) -> tuple[Step, Callable[[], Named]]:
    """Return fstep's step, as a user writes it; ``rows`` gives its microbatches."""
    model, mesh = job.model, fstep.Mesh()
    kept: dict[str, Any] = {}
    kept["state"] = fstep.init_state(job.params(), fstep.adamw)

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.Ratio(-model.logprob_sum(p, x, mb), mb.weights.sum())

    def step() -> tuple[Tensor, Tensor]:
        state = kept.pop("state")
        loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, state.params, rows())
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
        if job.keep:
            kept["grads"] = {p: g.clone() for p, g in zip(tree_paths(grads), tree_leaves(grads), strict=True)}
        kept["state"] = fstep.adamw.update(state, grads, lr=job.lr, skip=metrics["nonfinite"], donate=True)
        return metrics["loss"], metrics["grad_norm"]

    return step, lambda: kept["grads"]


def relative(x: float, y: float) -> float:
    """Say by how much x is off from y; infinite if one of them is not finite."""
    error = abs(x - y) / abs(y) if y else abs(x)
    return error if math.isfinite(error) else math.inf


def worst_gradient(found: Named, expected: Named) -> tuple[float, str]:
    """Return the largest relative error of a gradient, and whose it is."""
    if found.keys() != expected.keys():
        return math.inf, f"these are not in both: {sorted(found.keys() ^ expected.keys())}"

    def off(g: Tensor, other: Tensor) -> float:
        g, other = g.double(), other.double()
        error = float((g - other).norm() / other.norm())
        return error if math.isfinite(error) else math.inf

    return max((off(found[path], g), path) for path, g in expected.items())
