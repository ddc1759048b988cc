"""From hidden states and the head's weight to loss and both gradients: fstep beside Liger, cut-cross-entropy, plain torch.

    python benchmarks/head.py                 16384 tokens, dim 4096, vocab 128256, bfloat16; random and peaked logits
                                              (with a float32 weight: peaked ones only, unless asked for)
    python benchmarks/head.py --sides sum,liger,liger32 --logits peaked
    python benchmarks/head.py --tune          what other sizes of fstep's chunks would give
    python benchmarks/head.py --profile       where the time of fstep's sum goes, kernel by kernel
    python benchmarks/head.py --check         small, float64, on the CPU: losses and gradients compared

    sum, each            fstep.token_logprob_sum; a sum of fstep.token_logprobs
    liger, liger32       Liger's fused linear cross entropy; with accum_dtype=float32
    cce                  cut-cross-entropy
    plain                hidden @ weight.T and cross_entropy, compiled (eager on the CPU)
    products             three products of these sizes and nothing else: no loss, for the time alone

The weight is a bfloat16 parameter, or a float32 one that is rounded for the products: the peers' outside, by a cast in the
graph. Errors are those against float64, of the whole batch, relative. Memory is what a step adds at its peak to what it is
given.
"""

from __future__ import annotations

import argparse
import dataclasses
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Timing, in_turns, keep, machine, on_gpu, sync, table
from torch import Tensor
from torch.nn import functional as F

import fstep
from fstep.ops import head

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden, weight, labels
Step = Callable[[], Any]
SIDES = ("sum", "each", "liger", "liger32", "cce", "plain", "products")
NEEDS = {"liger": "liger_kernel", "liger32": "liger_kernel", "cce": "cut_cross_entropy"}
BOUNDS = {torch.float64: 1e-10, torch.bfloat16: 5e-3}  # of fstep's own errors
TUNE = [(1 << 28, 1), (1 << 28, 2), (1 << 28, 3), (1 << 28, 4), (1 << 29, 1), (1 << 29, 2), (3 << 27, 2), (1 << 30, 1)]


@dataclasses.dataclass(frozen=True)
class Job:
    """What all sides are given."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor


def draw(logits: str, tokens: int, dim: int, vocab: int, dtype: torch.dtype, master: torch.dtype, device: str) -> Job:
    """Draw hidden states and a weight whose logits are N(0, 1), and, if peaked, 8 to 20 more for the label."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, dim, device=device) / dim**0.5
    hidden, labels = torch.randn(tokens, dim, device=device), torch.randint(0, vocab, (tokens,), device=device)
    if logits == "peaked":
        hidden += (8 + 12 * torch.rand(tokens, 1, device=device)) * weight[labels]
    return Job(hidden.to(dtype).requires_grad_(), weight.to(dtype).to(master).requires_grad_(), labels)


def ours(kind: str) -> Loss:
    """Return fstep's loss."""

    def by_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -fstep.token_logprob_sum(hidden, weight, labels, torch.ones(labels.shape, device=labels.device))

    def by_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -fstep.token_logprobs(hidden, weight, labels).sum()

    return by_sum if kind == "sum" else by_tokens


def liger(accum: torch.dtype | None) -> Loss:
    """Return Liger's loss."""
    function = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def f(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function(hidden, weight.to(hidden.dtype), labels, reduction="sum", accum_dtype=accum)

    return f


def cce() -> Loss:
    """Return the loss of cut-cross-entropy, which leaves out what is too small for bfloat16."""
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def f(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function(hidden, weight.to(hidden.dtype), labels, reduction="sum")

    return f


def plain() -> Loss:
    """Return the loss as torch's own operations have it."""

    def f(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.to(hidden.dtype).T
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), labels, reduction="sum")

    return torch.compile(f) if on_gpu() else f


def products(job: Job) -> Step:
    """Return three products, in chunks of tokens as large as fstep's groups; the last two are not added up."""
    with torch.no_grad():
        hidden, weight = job.hidden.detach(), job.weight.detach().to(job.hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        for at in range(0, len(hidden), 3072):
            h = hidden[at : at + 3072]
            d = h @ weight.T
            torch.mm(d, weight, out=d_hidden[at : at + 3072])
            torch.mm(d.T, h, out=d_weight)

    return step


MAKE: dict[str, Callable[[], Loss]] = {
    "sum": lambda: ours("sum"),
    "each": lambda: ours("each"),
    "liger": lambda: liger(None),
    "liger32": lambda: liger(torch.float32),
    "cce": cce,
    "plain": plain,
}


def build(side: str, job: Job) -> Step:
    """Return a side's forward and backward pass: loss and gradients."""
    if side == "products":
        return products(job)
    f = MAKE[side]()

    def step() -> tuple[Tensor, ...]:
        loss = f(job.hidden, job.weight, job.labels)
        return loss.detach(), *torch.autograd.grad(loss, (job.hidden, job.weight))

    return step


def exact(job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and gradients in float64, of the weight as rounded for the products, some tokens at a time."""
    hidden, weight = (x.detach().to(job.hidden.dtype).double() for x in (job.hidden, job.weight))
    loss = hidden.new_zeros(())
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), 512):
        at = slice(start, start + 512)
        z = hidden[at] @ weight.T
        lse = z.logsumexp(-1)
        y = job.labels[at, None]
        loss += (lse - z.gather(1, y)[:, 0]).sum()
        d = z.sub_(lse[:, None]).exp_()
        d.scatter_add_(1, y, torch.full_like(y, -1, dtype=d.dtype))
        d_hidden[at] = d @ weight
        d_weight.addmm_(d.T, hidden[at])
        del z, d
    return loss, d_hidden, d_weight


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative difference, a part of the rows at a time, since a copy in float64 is large."""
    if a.dim() == 0:
        return float((a.double() - b).abs() / b.abs())
    pairs = list(zip(torch.split(a, 8192), torch.split(b, 8192), strict=True))
    off = sum(float((x.double() - y).square().sum()) for x, y in pairs)
    return (off / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5


def errors(sides: list[str], job: Job) -> dict[str, dict[str, float]]:
    """Return each side's errors; a side that fails is said, and left out."""
    want = exact(job)
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        if side == "products":
            found[side] = {}
            continue
        try:
            got = build(side, job)()
            names = ("loss", "d hidden", "d weight")
            found[side] = {n: relative(x, y) for n, x, y in zip(names, got, want, strict=True)}
            del got
        except Exception:  # whatever it is, the other sides go on
            print(f"left out: {side}, which failed:\n{traceback.format_exc()[-1500:]}", flush=True)
    for side in ("sum", "each"):
        if side in found and not max(found[side].values()) < BOUNDS[job.hidden.dtype]:
            raise SystemExit(f"fstep's {side} is wrong: {found[side]}")
    return found


def measure(sides: list[str], job: Job, a: argparse.Namespace) -> list[Timing]:
    """Compare, then time."""
    found = errors(sides, job)
    if on_gpu():
        torch.cuda.empty_cache()

    def quiet(side: str) -> Step:
        step = build(side, job)

        def run() -> None:
            step()

        return run

    rows = in_turns({side: partial(quiet, side) for side in found}, steps=a.steps)
    return [dataclasses.replace(r, notes={k: f"{v:.1e}" for k, v in found[r.name].items()}) for r in rows]


def tune(job: Job, steps: int) -> list[Timing]:
    """Time fstep's sum with chunks of logits, and of their gradients held, of other sizes."""
    before = head.CHUNK_BYTES, head.HELD

    def with_sizes(chunk: int, held: int) -> Step:
        step = build("sum", job)

        def run() -> None:
            head.CHUNK_BYTES, head.HELD = chunk, held
            try:
                step()
            finally:
                head.CHUNK_BYTES, head.HELD = before

        return run

    return in_turns({f"{c >> 20} MiB, {h} held": partial(with_sizes, c, h) for c, h in TUNE}, steps=steps)


def profile(job: Job, side: str) -> str:
    """Return a table of the kernels of one side, by time."""
    step = build(side, job)
    for _ in range(3):
        step()
    sync()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        step()
        sync()
    return p.key_averages().table(sort_by="device_time_total", row_limit=14, max_name_column_width=90)


def check() -> None:
    """Compare all sides that run on the CPU with float64."""
    for logits in ("random", "peaked"):
        job = draw(logits, 70, 16, 301, torch.float64, torch.float64, "cpu")
        for side, found in errors(["sum", "each", "plain"], job).items():
            print(f"{logits} logits, {side}: " + ", ".join(f"{name} off by {e:.1e}" for name, e in found.items()))
            if not max(found.values()) < BOUNDS[torch.float64]:
                raise SystemExit(f"{side} is wrong")
    print("equal")


def main() -> None:
    """Run what was asked for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sides", help="of " + ",".join(SIDES))
    p.add_argument("--logits", choices=["random", "peaked"], help="one of the two")
    p.add_argument("--master", choices=["bfloat16", "float32"], help="of the weight: one of the two")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--dim", type=int, default=4096)
    p.add_argument("--vocab", type=int, default=128256)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--tune", action="store_true", help="chunks of other sizes, too")
    p.add_argument("--profile", action="store_true", help="kernels, too")
    p.add_argument("--json", type=Path, help="add the rows to this file")
    p.add_argument("--check", action="store_true", help="compare on the CPU, and time nothing")
    a = p.parse_args()
    if a.check:
        check()
        return
    if not on_gpu():
        raise SystemExit("there is no GPU to measure on; --check compares on the CPU")
    sides = a.sides.split(",") if a.sides else list(SIDES)
    if unknown := set(sides) - set(SIDES):
        raise SystemExit(f"--sides: {', '.join(sorted(unknown))} not among {', '.join(SIDES)}")
    for side in [side for side in sides if side in NEEDS and find_spec(NEEDS[side]) is None]:
        print(f"left out: {side}, as {NEEDS[side]} is not installed", flush=True)
        sides.remove(side)
    print(f"{machine()}; {a.tokens} tokens, dim {a.dim}, vocab {a.vocab}", flush=True)
    settings = [
        (logits, master)
        for master in ([a.master] if a.master else ["bfloat16", "float32"])
        for logits in ([a.logits] if a.logits else ["random", "peaked"])
        if a.logits or a.master or (logits, master) != ("random", "float32")
    ]
    for logits, master in settings:
        job = draw(logits, a.tokens, a.dim, a.vocab, torch.bfloat16, getattr(torch, master), "cuda")
        rows = measure(sides, job, a)
        print(f"\n{logits} logits, weight in {master}\n\n{table(rows)}", flush=True)
        keep(a.json, f"head, {logits} logits, weight in {master}", rows, tokens=a.tokens, dim=a.dim, vocab=a.vocab)
        if a.tune:
            print(f"\n{table(tune(job, a.steps))}", flush=True)
        if a.profile:
            print(f"\n{profile(job, 'sum')}", flush=True)
        del job
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
