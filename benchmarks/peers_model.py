"""What the comparisons of peers.py share: a plain torch module of the same decoder, documents, and the relative errors.

`Llama` is written with torch alone, and reads dense rows: [rows, tokens], with a mask where documents lie end to end. Its
parameters have a `Dense`'s names (``layers.3.q`` there is ``layers.3.q.weight`` here), by which the two are matched.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fstep
from fstep_models.dense import Config

LEARN = 1e-2  # the learning rate of every update here


def make_config(layers: int, *, dim: int = 64, heads: int = 8, kv_heads: int = 4, ffn: int = 96, vocab: int = 131) -> Config:
    """Return a Llama's config; weights are drawn large, so that every gradient is."""
    rope = fstep.Rope(theta=10000.0, dim=dim // heads)
    return Config(
        family="llama", vocab=vocab, dim=dim, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=dim // heads, rope=rope, windows=(0,) * layers, init_std=0.8 * dim**-0.5,
    )  # fmt: skip


class Block(nn.Module):
    """One decoder layer, on rows [rows, tokens, dim]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)
        shapes = {"q": (c.dim, c.heads * c.head_dim), "o": (c.heads * c.head_dim, c.dim)}
        shapes |= {name: (c.dim, c.kv_heads * c.head_dim) for name in "kv"}
        shapes |= {"gate": (c.dim, c.ffn), "up": (c.dim, c.ffn), "down": (c.ffn, c.dim)}
        for name, (n, m) in shapes.items():
            self.add_module(name, nn.Linear(n, m, bias=False))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return the hidden states after this layer; without a mask every row is one document."""
        h = self.attn_norm(x)
        q, k, v = (self.get_submodule(n)(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for n in "qkv")
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.get_submodule("o")(y.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        gate, up, down = (self.get_submodule(n) for n in ("gate", "up", "down"))
        return x + down(F.silu(gate(h)) * up(h))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [rows, heads, tokens, head_dim] by angles [rows, 1, tokens, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Llama(nn.Module):
    """The layers ``which`` of a decoder, with the embedding if it is the first part and the head if it is the last."""

    def __init__(self, config: Config, which: Iterable[int] | None = None, *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab, c.dim) if first else None
        self.layers = nn.ModuleDict({str(i): Block(c) for i in (range(c.layers) if which is None else which)})
        self.norm = nn.RMSNorm(c.dim, c.eps) if last else None
        self.head = nn.Linear(c.dim, c.vocab, bias=False) if last else None

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map tokens or hidden states to hidden states, or to logits."""
        c = self.config
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        x = x if self.embed is None else self.embed(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        inverse = c.rope.theta ** (-torch.arange(0, c.head_dim, 2, device=x.device, dtype=torch.float64) / c.head_dim)
        angles = positions[:, None, :, None].to(wide) * inverse.to(wide).repeat(2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers.values():
            x = layer(x, cos, sin, mask)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def fill(config: Config, params: Any, which: Iterable[int] | None = None) -> Llama:
    """Return the module that holds copies of a `Dense`'s params, or of those of one stage."""
    with torch.device("meta"):
        module = Llama(config, which, first="embed" in params, last="head" in params)
    named = zip(fstep.tree_paths(params), fstep.tree_leaves(params), strict=True)
    module.load_state_dict({f"{path}.weight": x.detach().clone() for path, x in named}, assign=True)
    return module


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a module under our names, whole."""
    found = {}
    for name, p in module.named_parameters():
        grad: Any = p.grad
        found[name.removesuffix(".weight")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def dense_row(docs: fstep.Docs, device: str, *, multiple_of: int = 1) -> dict[str, Tensor]:
    """Lay documents out as a dense row [1, T], with a mask that keeps them apart; what fills it up is one more of them."""
    sizes = docs.lengths.tolist()
    total = max(sum(sizes), 1)
    spare = -total % multiple_of + total - sum(sizes)
    tokens, labels, weights, positions = (torch.zeros(total + -total % multiple_of, dtype=torch.int64) for _ in range(4))
    labels, weights = labels - 100, weights.to(docs.weights.dtype)
    start = 0
    for n in sizes:
        here, ahead = slice(start, start + n), slice(start + 1, start + n)
        tokens[here], positions[here] = docs.tokens[here], torch.arange(n)
        labels[start : start + n - 1], weights[start : start + n - 1] = docs.tokens[ahead], docs.weights[ahead]
        start += n
    document = torch.repeat_interleave(torch.tensor([*sizes, spare]))
    row = {"x": tokens, "positions": positions, "labels": labels, "weights": weights}
    seen = (document[:, None] == document).tril()
    return {name: x[None].to(device) for name, x in row.items()} | {"mask": seen[None, None].to(device)}


def loss_of(module: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """Return the summed loss of a dense row."""
    return nll(module(row["x"], row["positions"], row["mask"]), row["labels"], row["weights"])


def nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the labels' negative log likelihoods."""
    flat = logits.flatten(0, -2)
    return (F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=-100) * weights.flatten()).sum()


def ragged_docs(lengths: Iterable[int], vocab: int, *, step: int = 0) -> fstep.Docs:
    """Draw documents of these lengths whose tokens carry different weights; one is masked."""
    key = fstep.Key.seed(7).fold_in(step)
    sizes = list(lengths)
    tokens = [(key.fold_in(i).uniform((n,)) * vocab).long() for i, n in enumerate(sizes)]
    weights = [key.fold_in(-1 - i).uniform((n,), dtype=torch.float64) * (i != 2) for i, n in enumerate(sizes)]
    return fstep.make_docs(tokens, weights=weights, vocab_size=vocab)


@dataclass
class Row:
    """A line of the table: the worst errors of all ranks, or the reason why there are none."""

    part: str
    peer: str
    loss: float = 0.0
    leaf: str = ""
    error: float = 0.0
    leaves: int = 0
    note: str = ""
    equal: bool = True  # whether the two should be equal; what is known to differ is shown as such

    def line(self) -> str:
        """Return the row in markdown."""
        shown = f"{self.loss:.1e} | {self.error:.1e} | {self.leaf} | {self.leaves}" if self.leaf else "- | - | - | -"
        return f"| {self.part} | {self.peer} | {shown} | {self.note} |"


HEAD = "| | peer | error of the loss | worst error of a gradient | at | leaves | |\n|---|---|---|---|---|---|---|"
Named = dict[str, Tensor]


def compare(part: str, peer: str, ours: tuple[Any, Named], theirs: tuple[Any, Named], note: str = "") -> Row:
    """Compare what this rank has with what the peer has there, and return the worst of all ranks, the same on each."""
    mine, others = (float(torch.as_tensor(side[0]).detach()) for side in (ours, theirs))
    if ours[1].keys() != theirs[1].keys():
        raise SystemExit(f"{peer}: one of the two alone has {sorted(ours[1].keys() ^ theirs[1].keys())}")
    errors = {name: relative(x, theirs[1][name]) for name, x in ours[1].items()}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (abs(mine - others) / abs(others), errors))
    every = {name: max(e.get(name, 0.0) for _, e in found) for _, errors in found for name in errors}
    worst = max(every, key=lambda name: every[name])
    return Row(part, peer, max(loss for loss, _ in found), worst, every[worst], len(every), note)


def relative(x: Tensor, y: Tensor) -> float:
    """Return the norm of the difference over the norm; NaN counts as infinitely wrong."""
    if x.shape != y.shape:
        raise SystemExit(f"shapes {tuple(x.shape)} and {tuple(y.shape)} are compared")
    x, y = (t.detach().to("cpu", torch.float64) for t in (x, y))
    error = float((x - y).norm() / y.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def named(tree: Any) -> Named:
    """Return the leaves of a tree by name."""
    return dict(zip(fstep.tree_paths(tree), fstep.tree_leaves(tree), strict=True))


def measure(step: Callable[[], Any], steps: int, device: str) -> tuple[float, float]:
    """Return the median seconds of a step and the peak memory in GiB, the largest of all ranks'."""
    times = []
    for number in range(steps + 2):
        if number == 2:
            gc.collect()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    worst = torch.tensor([sorted(times[2:])[steps // 2], peak], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst[0]), float(worst[1])
