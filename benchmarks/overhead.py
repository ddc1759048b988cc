"""What purity costs: fstep's step beside a loop by hand that calls the same block and head, at sizes where Python shows.

    python benchmarks/overhead.py             on the GPU if there is one, else on one core of the CPU, in CPU time
    python benchmarks/overhead.py --check     float64, small: losses, norms and every gradient of three steps compared

    by hand    embed, blocks, head; loss.backward(); clip_grad_norm_; torch.optim.AdamW(fused=True); zero_grad
    fstep      pp_forward_backward; finalize_grads; adamw.update, both with donate=True

Both get a packed row or, in rows that say so, lists of tokens that each packs itself. What differs is everything around the
model's arithmetic: trees, private leaves, checks, states. The loop by hand does not look whether a gradient is finite.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from measure import Timing, in_turns, keep, machine, on_gpu
from torch import Tensor
from torch.nn import functional as F

import fstep
from fstep.tree import tree_leaves, tree_replace_leaves
from fstep_models.dense import Config, Dense
from fstep_models.dense_parts import tables

Step = Callable[[], tuple[Tensor, Tensor]]
Batch = Callable[[], fstep.Packed]
LR = 1e-4
BOUND = 1e-11  # of --check, in float64
BOUND_BF16 = 2e-2  # of a gradient leaf on a GPU, whose additions are in no fixed order


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a shape, and how the step is run."""

    hidden: int
    layers: int
    tokens: int
    compiled: bool = False
    packing: bool = False

    def __str__(self) -> str:
        how = ["compiled"] * self.compiled + ["with packing"] * self.packing
        return f"{self.hidden} x {self.layers}, {self.tokens} tokens" + "".join(f", {x}" for x in how)


CPU = [
    Case(64, 2, 256), Case(64, 8, 256), Case(64, 8, 256, packing=True), Case(256, 2, 256), Case(256, 8, 1024),
    Case(512, 2, 256), Case(512, 8, 256), Case(512, 2, 2048),
]  # fmt: skip
GPU = [
    Case(64, 2, 256), Case(64, 4, 256), Case(64, 8, 256), Case(256, 8, 1024), Case(512, 2, 256), Case(512, 8, 2048),
    Case(512, 8, 2048, packing=True), Case(512, 8, 2048, compiled=True),
]  # fmt: skip


def make_model(case: Case, *, check: bool) -> Dense:
    """Return a Llama of this shape, with a vocabulary that does not hide what is measured."""
    head_dim = 16 if case.hidden < 256 else 64
    heads = case.hidden // head_dim
    config = Config(
        family="llama", vocab=64 if check else 1024, dim=case.hidden, ffn=3 * case.hidden, layers=case.layers, heads=heads,
        kv_heads=max(heads // 2, 1), head_dim=head_dim, rope=fstep.Rope(theta=10000.0, dim=head_dim),
        windows=(0,) * case.layers,
    )  # fmt: skip
    return Dense(config, dtype=torch.bfloat16 if on_gpu() and not check else None, compile=case.compiled)


def pack_by_hand(docs: Sequence[Tensor], device: str) -> fstep.Packed:
    """Lay documents end to end, as one would for this and nothing else."""
    lengths = [len(d) for d in docs]
    tokens = torch.cat(list(docs))
    ends = torch.tensor(list(accumulate(lengths))) - 1
    labels = torch.roll(tokens, -1)
    labels[ends] = -100
    cu = F.pad(ends + 1, (1, 0)).to(torch.int32)
    return fstep.to_device(
        fstep.Packed(
            tokens=tokens,
            labels=labels,
            weights=(labels >= 0).to(torch.float32),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            targets={},
            inputs={},
            cu_seqlens=cu,
            cu_seqlens_padded=cu,
            index=torch.arange(len(docs)),
            per_document={},
            shared={},
            max_seqlen=max(lengths),
        ),
        device,
    )


def by_hand(model: Dense, params: Any, batch: Batch, seen: list[list[Tensor]] | None = None) -> Step:
    """Return a step of the loop by hand; the clipped gradients go to ``seen``."""
    leaves = [p.clone().requires_grad_() for p in tree_leaves(params)]
    p = tree_replace_leaves(params, leaves)
    mesh = fstep.Mesh()
    betas, eps = fstep.adamw.betas, fstep.adamw.eps
    opt = torch.optim.AdamW(leaves, lr=LR, betas=betas, eps=eps, weight_decay=0.0, fused=True)

    def step() -> tuple[Tensor, Tensor]:
        mb = batch()
        x = F.embedding(mb.tokens, p["embed"])
        x = x if model.dtype is None else x.to(model.dtype)
        cos, sin = tables(model.config.rope, mb, x.dtype)
        for i, layer in p["layers"].items():
            window = model.config.windows[i]
            x = model._block(layer, x, cos, sin, mb.cu_seqlens_padded, mb.max_seqlen, window, model, mesh)
        loss = -(model.logprobs(p, x, mb) * mb.weights).sum() / mb.weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        if seen is not None:
            seen.append([g.clone() for x in leaves if (g := x.grad) is not None])
        opt.step()
        opt.zero_grad()
        return loss.detach(), norm

    return step


def by_fstep(model: Dense, params: Any, batch: Batch, seen: list[list[Tensor]] | None = None) -> Step:
    """Return a step of fstep."""
    kept = {"state": fstep.init_state(fstep.tree_map(torch.clone, params), fstep.adamw)}
    stage, mesh = model.stage(), fstep.Mesh()

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    def step() -> tuple[Tensor, Tensor]:
        state = kept.pop("state")
        loss, grads = fstep.pp_forward_backward(stage, loss_fn, state.params, [batch()])
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
        if seen is not None:
            seen.append([g.clone() for g in tree_leaves(grads)])
        kept["state"] = fstep.adamw.update(state, grads, lr=LR, skip=metrics["nonfinite"], donate=True)
        return metrics["loss"], metrics["grad_norm"]

    return step


def sides(case: Case, *, check: bool) -> tuple[dict[str, Callable[..., Step]], int]:
    """Return the builders of both sides, and how many leaves the params have."""
    device = "cuda" if on_gpu() and not check else "cpu"
    model = make_model(case, check=check)
    key = fstep.Key.seed(0)
    params = model.init(key, dtype=torch.float64 if check else torch.float32, device=device)
    longest = min(case.tokens // 2, 512)
    lengths = [longest] * (case.tokens // longest)
    docs = [(key.fold_in(i).uniform((n,)) * model.config.vocab).long() for i, n in enumerate(lengths)]

    def pack() -> fstep.Packed:
        return fstep.to_device(fstep.pack_thd(fstep.make_docs(docs)), device)

    row = pack()
    hand: Batch = (lambda: pack_by_hand(docs, device)) if case.packing else (lambda: row)
    ours: Batch = pack if case.packing else (lambda: row)
    made = {
        "by hand": lambda seen=None: by_hand(model, params, hand, seen),
        "fstep": lambda seen=None: by_fstep(model, params, ours, seen),
    }
    return made, len(tree_leaves(params))


def compare(case: Case, *, check: bool, steps: int = 3) -> float:
    """Take some steps on both sides; return the worst relative difference of a loss, a norm or a gradient leaf."""
    made, _ = sides(case, check=check)
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in made}
    run = {name: build(seen[name]) for name, build in made.items()}
    worst = 0.0
    for number in range(steps):
        (la, na), (lb, nb) = run["by hand"](), run["fstep"]()
        a, b = ([loss, norm, *seen[name][number]] for name, loss, norm in (("by hand", la, na), ("fstep", lb, nb)))
        if len(a) != len(b):
            raise SystemExit(f"{case}: {len(a) - 2} gradients by hand, {len(b) - 2} of fstep")
        worst = max(worst, *(float((x.double() - y.double()).norm() / x.double().norm()) for x, y in zip(a, b, strict=True)))
    return worst


def over(hand: Timing, ours: Timing) -> float:
    """Return the median of how many seconds a step of fstep takes longer, rounds paired."""
    return statistics.median(b - a for a, b in zip(hand.seconds, ours.seconds, strict=True))


def fitted(rows: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return (seconds a step, seconds a leaf) of a straight line through (leaves, seconds)."""
    x, y = zip(*rows, strict=True)
    slope, start = statistics.linear_regression(x, y)
    return start, slope


def main() -> None:
    """Measure each case and print the table, or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--only", default="", help="only cases that this is part of, e.g. '512 x'")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="compare on the CPU, small, float64")
    a = p.parse_args()
    if not on_gpu() or a.check:
        torch.set_num_threads(1)
    if a.check:
        for case in (Case(32, 2, 48), Case(32, 3, 40, packing=True)):
            worst = compare(case, check=True)
            print(f"{case}: worst relative difference of three steps {worst:.1e}", flush=True)
            if not worst < BOUND:
                raise SystemExit(f"{case}: the sides differ by {worst:.1e}")
        return
    print(f"{machine()}\n\n| hidden x layers | by hand | fstep | ratio | 10% .. 90% | over, us | leaves | error |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    clock = time.perf_counter if on_gpu() else time.process_time
    points = []
    for case in [c for c in (GPU if on_gpu() else CPU) if a.only in str(c)]:
        worst = compare(case, check=False, steps=1)
        if not worst < BOUND_BF16:
            raise SystemExit(f"{case}: the sides differ by {worst:.1e}")
        made, leaves = sides(case, check=False)
        # On the GPU steps follow one another as in training, where the CPU runs ahead.
        rows = in_turns(made, steps=a.steps, warmup=3, repeat=5 if on_gpu() else 1, clock=clock)
        hand, ours = rows
        ratios = sorted(y / x for x, y in zip(hand.seconds, ours.seconds, strict=True))
        more = over(hand, ours)
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        print(
            f"| {case} | {hand.median * 1e3:.2f} ms | {ours.median * 1e3:.2f} ms | {statistics.median(ratios):.3f} | "
            f"{low:.3f} .. {high:.3f} | {more * 1e6:.0f} | {leaves} | {worst:.0e} |",
            flush=True,
        )
        keep(a.json, f"overhead: {case}", rows, leaves=leaves)
        if case.hidden == 64 and not case.packing and not case.compiled:
            points.append((leaves, more))
    if len(points) > 1:
        start, slope = fitted(points)
        print(f"\nat hidden 64 a step takes {start * 1e6:.0f} us and {slope * 1e6:.1f} us a leaf longer")


if __name__ == "__main__":
    main()
