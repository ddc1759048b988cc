"""Documents of very different lengths on one GPU: fstep's rows beside padding and others' packing, in one process.

    python benchmarks/packing.py                       Qwen3-1.7B shapes, Zipf lengths up to 4096
    python benchmarks/packing.py --sides fstep,round,fixed,same,bfd --tokens 16384
    python benchmarks/packing.py --check               small, float32, on the CPU: losses and every gradient compared

A step takes the next ``--documents`` of a fixed list, whatever a side makes of them, adds up their gradients, clips them and
takes a step of fused AdamW. What counts is useful tokens, those of documents, in a second of all steps; ``fill`` is their
share of the places that were computed. fstep makes its rows in the step; the others' are made ahead.

    fstep     split_microbatches(max_tokens), pack_thd: rows of about the same length, without padding
    round     the same, each row padded to a multiple of 256
    fixed     the same, each row padded to max_tokens: one shape
    padded    transformers, four documents at a time, padded to the longest, SDPA: what a Trainer does by default
    packed    transformers, rows of max_tokens filled in the documents' order, varlen_attn, layers compiled
    bfd       the same on rows of TRL's packing (best fit decreasing), without padding, as its SFTTrainer feeds a model
    same      the same on fstep's rows

Params, moments and arithmetic are bfloat16 on all sides, where the others are fastest; ``--master float32`` keeps params and
moments in float32 on all sides (transformers computes under autocast then).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import SHAPES, Job, by_fstep, flops, relative, shape, worst_gradient
from measure import Timing, in_turns, keep, machine, on_gpu, table
from peers_modules import quiet
from peers_packing import KERNEL, Docs, by_trl, by_us, in_order, padded, places, register, transformers_step
from sides import Build, Guarded, pick

import fstep

SIDES = ("fstep", "padded", "packed", "bfd", "round", "fixed", "same")
NEEDS = {"bfd": "trl"}
BOUND = 1e-5  # of --check; what float32 leaves is 1e-6
WARM = 2  # steps; their rows differ in size, so that what is compiled for changing sizes is compiled there


def lengths(num: int, longest: int) -> list[int]:
    """Draw Zipf lengths: many short documents, and a few of the longest; the mean is 740 for 4096."""
    rng = np.random.default_rng(0)
    drawn = rng.zipf(1.5, num) * 64 - rng.integers(0, 64, num)
    return [int(n) for n in drawn.clip(32, None).clip(max=longest)]


def make_groups(num: int, documents: int, sizes: Sequence[int], vocab: int) -> list[Docs]:
    """Return the documents of each step."""
    g = torch.Generator().manual_seed(1)
    docs = [torch.randint(0, vocab, (n,), generator=g) for n in sizes]
    return [docs[i * documents : (i + 1) * documents] for i in range(num)]


def our_rows(docs: Docs, max_tokens: int, side: str) -> list[fstep.Packed]:
    """Make fstep's rows, on the host."""
    rows = []
    for part in fstep.split_microbatches(fstep.make_docs(docs), max_tokens=max_tokens):
        tokens = len(part.tokens)
        length = {"fstep": None, "round": -(-tokens // 256) * 256, "fixed": max_tokens}[side]
        rows.append(fstep.pack_thd(part, length=length))
    return rows


def our_places(docs: Docs, max_tokens: int, side: str) -> int:
    """Count the places that fstep computes on."""
    return sum(len(row.tokens) for row in our_rows(docs, max_tokens, side))


def ours(job: Job, groups: Sequence[Docs], max_tokens: int, side: str) -> Any:
    """Return fstep's step on the next group."""
    turn = iter(range(1 << 30))

    def rows() -> list[fstep.Packed]:
        made = our_rows(groups[next(turn) % len(groups)], max_tokens, side)
        return [fstep.to_device(row, job.device) for row in made]

    return by_fstep(job, rows)


def builders(job: Job, groups: Sequence[Docs], max_tokens: int) -> dict[str, tuple[Build, Callable[[Docs], int]]]:
    """Return each side's builder, and how many places it computes for a group."""
    register()
    sides: dict[str, tuple[Build, Callable[[Docs], int]]] = {}
    for name in ("fstep", "round", "fixed"):
        sides[name] = (partial(ours, job, groups, max_tokens, name), partial(our_places, max_tokens=max_tokens, side=name))
    ways: dict[str, Any] = {
        "padded": padded,
        "packed": partial(in_order, length=max_tokens),
        "bfd": partial(by_trl, length=max_tokens),
        "same": partial(by_us, length=max_tokens),
    }
    for name, lay in ways.items():
        build = partial(transformers_step, job, groups, lay, "sdpa" if name == "padded" else KERNEL)
        sides[name] = (build, partial(places, lay))
    return sides


def measure(job: Job, sides: Sequence[str], a: argparse.Namespace) -> list[Timing]:
    """Time the sides, and print the table."""
    sizes = lengths((WARM + a.steps) * a.documents, a.longest)
    groups = make_groups(WARM + a.steps, a.documents, sizes, job.config.vocab)
    timed_groups = groups[WARM:]
    useful = [sum(map(len, group)) for group in timed_groups]
    print(f"{machine()}; {a.shape}, {job.config.layers} layers, params in {job.master}; rows of at most {a.tokens} tokens")
    print(f"{a.steps} steps of {a.documents} documents, of {min(sizes)} to {max(sizes)} tokens, mean {np.mean(sizes):.0f}")
    todo, guard = builders(job, groups, a.tokens), Guarded(WARM)
    with quiet():
        timed = in_turns({s: guard.side(s, todo[s][0]) for s in sides}, steps=a.steps, warmup=WARM, apart=a.apart)
    work = sum(flops(job.config, [len(doc) for doc in group]) for group in timed_groups)
    rows: list[Timing] = []
    rates: dict[str, float] = {}
    for row in timed:
        if row.name in guard.failed:
            continue
        rates[row.name] = sum(useful) / sum(row.seconds)
        first = next(iter(rates))
        notes = {
            "useful tokens/s": f"{rates[row.name]:,.0f}",
            "of the first's": f"{rates[row.name] / rates[first]:.3f}",
            "fill": f"{sum(useful) / sum(map(todo[row.name][1], timed_groups)):.3f}",
            "useful TFLOP/s": f"{work / sum(row.seconds) / 1e12:.0f}",
        }
        rows.append(dataclasses.replace(row, notes=notes | guard.errors(row.name, first)))
    if rows:
        print(f"\n{table(rows)}\n", flush=True)
    facts = {"shape": a.shape, "max_tokens": a.tokens, "documents": a.documents, "useful": useful, "rates": rates}
    keep(a.json, "packing", rows, **facts, master=str(job.master))
    return rows


def check(a: argparse.Namespace) -> float:
    """Compare losses, norms and every gradient with fstep's, two steps long; return the worst difference."""
    backend = "inductor" if a.inductor else None
    job = Job(shape("small-qwen"), "cpu", low=torch.float32, backend=backend, lr=1e-3, keep=True)
    sizes = [max(2, n // 80) for n in lengths(2 * 9, 4096)]
    groups = make_groups(2, 9, sizes, job.config.vocab)
    todo = builders(job, groups, 64)
    ours, our_grads = todo["fstep"][0]()
    sides = [s for s in pick(a.sides, SIDES, SIDES, NEEDS) if s != "fstep"]
    with quiet():
        theirs = {s: todo[s][0]() for s in sides}
    worst = 0.0
    for number, group in enumerate(groups):
        loss, norm = ours()
        for side, (step, grads) in theirs.items():
            got = step()
            rows = [(relative(float(x), float(y)), n) for x, y, n in zip(got, (loss, norm), ("loss", "norm"), strict=True)]
            error, what = max([*rows, worst_gradient(grads(), our_grads())])
            worst = max(worst, error)
            fill = sum(map(len, group)) / todo[side][1](group)
            print(f"{side}, step {number}, fill {fill:.3f}: {what} is off by {error:.1e}", flush=True)
    return worst


def main() -> None:
    """Measure, or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="1.7b", choices=SHAPES)
    p.add_argument("--layers", type=int, help="another number of layers")
    p.add_argument("--tokens", type=int, default=8192, help="the most that a row holds")
    p.add_argument("--documents", type=int, default=32, help="of a step")
    p.add_argument("--longest", type=int, default=4096)
    p.add_argument(
        "--master", default="bfloat16", choices=["float32", "bfloat16"], help="what params and moments are kept in"
    )
    p.add_argument("--sides", help=f"of {', '.join(SIDES)}; the first is what the others are compared with")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--apart", action="store_true", help="one side after the other, where not all fit into memory")
    p.add_argument("--json", type=Path, help="add the result to this file")
    p.add_argument("--check", action="store_true", help="compare on the CPU")
    p.add_argument("--inductor", action="store_true", help="with --check: compile fstep's block")
    a = p.parse_args()
    if a.check:
        worst = check(a)
        print(f"worst {worst:.1e}: {'equal' if worst < BOUND else 'DIFFERENT'}")
        raise SystemExit(worst >= BOUND)
    if not on_gpu():
        raise SystemExit("there is no GPU here; --check compares on the CPU")
    job = Job(shape(a.shape, a.layers), "cuda", master=getattr(torch, a.master))
    measure(job, pick(a.sides, SIDES[:4], SIDES, NEEDS), a)


if __name__ == "__main__":
    main()
