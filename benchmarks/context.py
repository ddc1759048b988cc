"""Attention over ranks: cp_attention beside ring-flash-attn, torch's ring and all-gather, and against the ideal.

    ideal    the same attention on one GPU, divided by the number of ranks; measured in the same run up to 128k tokens,
             and beyond from its operations a second there

    torchrun --nproc-per-node 4 benchmarks/context.py               8k to 1M tokens, and a packed row
    torchrun --nproc-per-node 2 benchmarks/context.py --sizes 32k,128k,packed
    torchrun --nproc-per-node 4 benchmarks/context.py --model       two layers of a decoder, 128k tokens
    torchrun --nproc-per-node 2 benchmarks/context.py --check       small, on the CPU: equal to one process

A step is forward and backward of one layer's attention: 32 query and 8 key heads of 128, bfloat16. Before anything is timed
each side's output and gradients are compared with one GPU's, on one document and on a packed row of 8k tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from job import llama
from measure import Timing, in_turns, keep, machine, on_gpu, slowest, table
from peers_context import Attend, Row, by_hand, ring_flash_attn, torchs
from torch import Tensor

import fstep
from fstep_models.dense import Config, Dense

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SMALL = (4, 2, 16)
K = 1024
SIZES = {"8k": 8 * K, "32k": 32 * K, "128k": 128 * K, "512k": 512 * K, "1m": 1024 * K}
PACKED = (46, 24, 16, 12, 8, 6, 4, 3, 2, 1.5, 1, 0.75, 0.5, 0.375, 0.25, 0.25, 0.125, 0.125, *[1 / 16] * 34)  # of 128k
FEW = 256 * K  # tokens from which on only these sides run, since a step takes seconds
FEWER = {512 * K: ("fstep, auto", "fstep, ring"), 1024 * K: ("fstep, auto",)}
BOUND = 1.5e-2  # of relative errors in bfloat16; a wrong mask or order is off by more than 0.1


@dataclass(frozen=True)
class Side:
    """One way to attend over ranks. ``inside`` runs a step where the side wants it run."""

    attend: Attend | None = None
    inside: Callable[[Callable[[Attend], Any]], Any] | None = None

    def pull(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
        """Return the output and the gradients."""

        def step(attend: Attend) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = attend(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, g)]

        if self.inside is not None:
            found: list[Tensor] = self.inside(step)
            return found
        assert self.attend is not None
        return step(self.attend)


def ours(method: str, row: Row) -> Side:
    """cp_attention."""
    cu, longest, axis = row.boundaries(row.size), row.longest, row.mesh.cp
    return Side(lambda q, k, v: fstep.cp_attention(q, k, v, cu, axis=axis, max_seqlen=longest, method=method))


def alone(row: Row) -> Side:
    """The whole row on one GPU."""
    cu, longest = row.boundaries(1), max(row.lengths)
    return Side(lambda q, k, v: fstep.packed_attention(q, k, v, cu, max_seqlen=longest))


SIDES: dict[str, Callable[[Row], Side]] = {
    **{f"fstep, {m}": partial(ours, m) for m in ("auto", "allgather", "ulysses", "ring")},
    "ring-flash-attn": lambda row: Side(ring_flash_attn(row)),
    "all-gather by hand": lambda row: Side(by_hand(row)),
    "torch, cuDNN": lambda row: Side(inside=torchs(row, "CUDNN_ATTENTION")),
    "torch, flash": lambda row: Side(inside=torchs(row, "FLASH_ATTENTION")),
}


def flop(lengths: Sequence[int]) -> float:
    """Operations of forward and backward of causal attention."""
    return 3.5 * sum(2.0 * n * (n + 1) for n in lengths) * HEADS * HEAD_DIM


def draw(tokens: int, device: str, dtype: torch.dtype, seed: int, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return q, k, v and a gradient of the output."""
    heads, kv_heads, dim = shape
    g = torch.Generator(device).manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn((tokens, n, dim), device=device, dtype=dtype, generator=g) for n in sizes]


def said(row: Row, name: str, error: Exception) -> None:
    """Say that a side is left out, and why."""
    lines = traceback.format_exception(error)
    last = " / ".join("".join(lines).strip().splitlines()[-3:])
    print(f"left out: {name} on {row.name}: {last[:400] if not isinstance(error, ValueError) else error}", flush=True)


def errors(row: Row, names: Sequence[str], dtype: torch.dtype, shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """Return how far each side that runs is from one process, in its output and gradients: the worst of all ranks."""
    xs = draw(row.tokens, row.device, dtype, 0, shape)
    want = [row.mine(x) for x in alone(row).pull(*xs)]
    mine = [row.mine(x) for x in xs]
    found = {}
    for name in names:
        try:
            got = SIDES[name](row).pull(*mine)
        except Exception as error:  # whatever it is, the other sides go on
            said(row, name, error)
            continue
        found[name] = [
            slowest(float((a.double() - b.double()).norm() / b.double().norm())) for a, b in zip(got, want, strict=True)
        ]
    return found


def installed(names: Sequence[str]) -> list[str]:
    """Leave out what is not installed."""
    if "ring-flash-attn" in names and find_spec("ring_flash_attn") is None:
        print("left out: ring-flash-attn, which is not installed", flush=True)
        return [name for name in names if name != "ring-flash-attn"]
    return list(names)


def check(mesh: fstep.Mesh, names: Sequence[str]) -> None:
    """Compare every side that runs on the CPU with one process, in float64. ring-flash-attn takes 16 bits alone."""
    unit, wrong = 2 * mesh.cp.size, []
    for name, lengths in {"one document": (6 * unit,), "packed": (5 * unit, unit, 3 * unit, 7 * unit)}.items():
        for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, BOUND)):
            sides = [side for side in names if (side == "ring-flash-attn") == (dtype == torch.bfloat16)]
            for side, found in errors(Row(name, lengths, mesh, "cpu"), sides, dtype, SMALL).items():
                print(f"{name:12} {side:20} out, dq, dk, dv are off by {' '.join(f'{e:.1e}' for e in found)}")
                wrong += [side] if max(found) >= bound else []
    print("DIFFERENT: " + ", ".join(wrong) if wrong else "equal", flush=True)
    raise SystemExit(bool(wrong))


def right(mesh: fstep.Mesh, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Compare the sides on 8k tokens, print their errors, and return those of the sides that are right."""
    shape, unit = (HEADS, KV_HEADS, HEAD_DIM), 2 * mesh.cp.size
    lengths = {"one document": (8 * K,), "packed": (4 * K, 3 * K, 8 * unit, K - 8 * unit)}
    fine: dict[str, dict[str, str]] = {name: {} for name in names}
    for about, of in lengths.items():
        for name, found in errors(Row(about, of, mesh, "cuda"), names, torch.bfloat16, shape).items():
            print(f"{about:12} {name:20} out, dq, dk, dv are off by {' '.join(f'{e:.1e}' for e in found)}", flush=True)
            fine[name][about] = f"{max(found):.1e}"
            if max(found) > BOUND:
                print(f"left out: {name}, which is wrong on {about}", flush=True)
                fine.pop(name)
                names = [n for n in names if n != name]
    return fine


def measure(row: Row, names: Sequence[str], a: argparse.Namespace, rate: float | None) -> tuple[list[Timing], float]:
    """Time the sides in turns, with one GPU's attention where that is short enough; return its operations a second."""
    work, shape = flop(row.lengths), (HEADS, KV_HEADS, HEAD_DIM)
    mine = draw(row.tokens // row.size, row.device, torch.bfloat16, row.mesh.rank, shape)
    failed: set[str] = set()

    def build(name: str) -> Callable[[], Any]:
        made: list[Side] = []

        def step() -> None:
            if name in failed:
                return
            try:
                if not made:
                    made.append(SIDES[name](row))
                made[0].pull(*mine)
            except Exception as error:
                failed.add(name)
                said(row, name, error)

        return step

    sides: dict[str, Callable[[], Any]] = {name: partial(build, name) for name in names}
    seconds = work / row.size / 450e12
    steps = a.steps or max(1, min(20, int(a.seconds / seconds)))
    if row.tokens <= FEW:
        xs = draw(row.tokens, row.device, torch.bfloat16, 0, shape)
        one = alone(row)
        sides["one GPU"] = lambda: lambda: one.pull(*xs)
    found = in_turns(sides, steps=steps, warmup=2 if row.tokens <= FEW else 0)
    if row.tokens <= FEW:
        rate = work / found[-1].median
    assert rate is not None
    ideal = work / rate / row.size
    total = torch.cuda.get_device_properties(0).total_memory
    given = 2 * len(mine[0]) * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM
    rows = []
    for side in found:
        if side.name in failed:
            continue
        over = 1 if side.name == "one GPU" else row.size
        fits = total / (side.peak + given * row.size / over) * row.tokens
        notes = {"% of ideal": f"{100 * ideal * row.size / over / side.median:.1f}", "fits tokens": f"{fits / K / K:.2f}M"}
        notes["TFLOP/s/GPU"] = f"{work / over / side.median / 1e12:.0f}"
        rows.append(dataclasses.replace(side, notes=notes))
    return rows, rate


def model(mesh: fstep.Mesh, config: Config, tokens: int, steps: int, device: str) -> list[Timing]:
    """Time loss and gradients of a few layers with one document over the ranks, and the same on one GPU."""
    net = Dense(config, dtype=torch.bfloat16, compile=device == "cuda")
    params = net.init(fstep.Key.seed(0), device=device)
    row = fstep.to_device(fstep.pack_thd(fstep.make_docs([torch.arange(tokens) % config.vocab])), device)

    def build(on: fstep.Mesh) -> Callable[[], Any]:
        part, stage = fstep.cp_shard(row, axis=on.cp), net.stage(on)

        def loss(p: Any) -> Tensor:
            return fstep.sft_loss(net.logprobs(p, stage(p, None, part), part, mesh=on), part.weights).num

        return lambda: fstep.value_and_grad(loss)(params)

    return in_turns({"cp": lambda: build(mesh), "one GPU": lambda: build(fstep.Mesh())}, steps=steps, warmup=2, apart=True)


def main() -> None:
    """Compare, measure and print the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", default="8k,32k,128k,packed,512k,1m", help="of one document, or packed: documents of 128k")
    p.add_argument("--sides", help=f"of {' | '.join(SIDES)}, with | between them")
    p.add_argument("--steps", type=int, default=0, help="of each side; otherwise as many as take --seconds")
    p.add_argument("--seconds", type=float, default=1.5, help="of each side at each size")
    p.add_argument("--model", action="store_true", help="a model instead of its attention")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="compare with one process on the CPU, small, float64")
    a = p.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        raise SystemExit("run it under torchrun with 2 or more processes")
    with fstep.mesh_from_env(cp=ranks, backend="gloo" if a.check else None) as mesh:
        if mesh.rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the process ends
        names = installed(list(SIDES) if a.sides is None else a.sides.split("|"))
        if a.check or not on_gpu():
            check(mesh, names)
        print(machine(), flush=True)
        if a.model:
            rows = model(mesh, llama(4096, 14336, 32, 2, vocab=32000), 128 * K, a.steps or 4, "cuda")
            share = 100 * rows[1].median / ranks / rows[0].median
            print(f"two layers, 128k tokens, loss and gradients: {share:.1f}% of ideal\n{table(rows)}", flush=True)
            keep(a.json, f"context, model, {ranks} ranks", rows, ideal=rows[1].median / ranks)
            return
        fine, rate = right(mesh, names), None
        for size in a.sizes.split(","):
            of = tuple(int(n * K) for n in PACKED) if size == "packed" else (SIZES[size],)
            row = Row(size, of, mesh, "cuda")
            if row.tokens // ranks * HEADS * HEAD_DIM >= 2**31:
                print(f"\nleft out: {size}, as kernels count a rank's queries in 32 bits", flush=True)
                continue
            about = "packed" if len(of) > 1 else "one document"
            here = [
                n for n in fine if about in fine[n] and (row.tokens <= FEW or a.sides is not None or n in FEWER[row.tokens])
            ]
            if row.tokens > FEW and rate is None:
                rate = measure(Row("128k", (128 * K,), mesh, "cuda"), [], a, None)[1]
            rows, found = measure(row, here, a, rate)
            rate = found if len(of) == 1 else rate
            print(f"\n{len(of)} document(s), {row.tokens} tokens over {ranks} ranks, forward and backward\n", flush=True)
            print(table(rows, work=row.tokens, unit="tokens/s"), flush=True)
            keep(a.json, f"context, {size}, {ranks} ranks", rows, flop=flop(of), tokens=row.tokens, rate=rate)


if __name__ == "__main__":
    main()
