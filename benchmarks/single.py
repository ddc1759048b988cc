"""A training step on one GPU: fstep beside a loop by hand, torchtitan and transformers with Liger, in one process.

    python benchmarks/single.py                        Qwen3-1.7B shapes, 8192 tokens in documents of 2048, all sides
    python benchmarks/single.py --shape 8b --remat full --doc 8192 --sides fstep,kernels,dense
    python benchmarks/single.py --check                small, float32, on the CPU: losses and every gradient compared

Every side starts from the same weights, sees the same documents, computes in bfloat16 with float32 parameters and moments
(``--master bfloat16``: no side has float32 ones), clips to norm 1 and takes a step of fused AdamW. First its losses and
gradient norms of three steps are compared with fstep's, then steps are timed in turns.

    dense, varlen    the loop by hand (by_hand.py), with SDPA on a batch of documents of one length, or torch's varlen_attn
    kernels          the loop by hand with fstep's attention and head: what differs is the step around them
    titan            torchtitan 0.2.2 (peers_modules.py), SDPA
    liger, hf        transformers with Liger's kernels, and without, SDPA
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from by_hand import hand
from job import SHAPES, Job, by_fstep, flops, relative, shape, worst_gradient
from measure import Timing, in_turns, keep, machine, on_gpu, table
from peers_modules import hf, quiet, titan
from sides import Build, Guarded, pick

import fstep

SIDES = ("fstep", "kernels", "dense", "titan", "liger", "varlen", "hf")
NEEDS = {"titan": "torchtitan", "liger": "liger_kernel"}
BOUND = 1e-5  # of --check; what float32 leaves is 1e-6
COMPARED = 3  # steps; they are the warm-up too


def make_batch(job: Job, tokens: int, doc: int) -> fstep.Packed:
    """Draw documents of one length, end to end."""
    if tokens % doc:
        raise SystemExit(f"--tokens {tokens} is no multiple of --doc {doc}")
    key = fstep.Key.seed(1)
    docs = [(key.fold_in(i).uniform((doc,)) * job.config.vocab).long() for i in range(tokens // doc)]
    return fstep.to_device(fstep.pack_thd(fstep.make_docs(docs, vocab_size=job.config.vocab)), job.device)


def builders(job: Job, batch: fstep.Packed) -> dict[str, Build]:
    """Return each side's builder of ``(step, grads)``."""
    return {
        "fstep": lambda: by_fstep(job, lambda: [batch]),
        **{name: partial(hand, job, batch, name) for name in ("kernels", "dense", "varlen")},
        "titan": lambda: titan(job, batch),
        "liger": lambda: hf(job, batch, liger=True),
        "hf": lambda: hf(job, batch, liger=False),
    }


def chosen(text: str | None, cpu: bool) -> list[str]:
    """Return the sides to run: those asked for, or all that this machine can run."""
    default = ("fstep", "kernels", "dense", "titan", "hf") if cpu else SIDES[:5]  # the others' kernels are for a GPU
    sides = pick(text, default, SIDES, NEEDS)
    if "hf" in sides and "liger" in sides:
        raise SystemExit("--sides: Liger changes transformers' classes for the whole process; ask for hf or liger")
    return sides


def measure(job: Job, sides: Sequence[str], a: argparse.Namespace) -> list[Timing]:
    """Time the sides, and print the table."""
    batch = make_batch(job, a.tokens, a.doc)
    todo, guard = builders(job, batch), Guarded(COMPARED)
    params = sum(math.prod(place.shape) for place in fstep.places(job.model.spec()))
    states = 3 * params * job.master.itemsize * len(sides)
    apart = a.apart or (on_gpu() and states > 0.7 * torch.cuda.get_device_properties(0).total_memory)
    print(
        f"{machine()}; {a.shape}: {job.config.layers} layers, {params / 1e9:.2f}e9 params in {job.master}, {a.tokens} tokens"
    )
    print(f"documents of {a.doc}, remat {a.remat}, sides {'one after the other' if apart else 'in turns'}", flush=True)
    with quiet():
        timed = in_turns({s: guard.side(s, todo[s]) for s in sides}, steps=a.steps, warmup=COMPARED, apart=apart)
    work = flops(job.config, [a.doc] * (a.tokens // a.doc))
    ran = [row for row in timed if row.name not in guard.failed]
    rows = [
        dataclasses.replace(r, notes={"TFLOP/s": f"{work / r.median / 1e12:.0f}", **guard.errors(r.name, ran[0].name)})
        for r in ran
    ]
    if rows:
        print(f"\n{table(rows, work=a.tokens)}\n", flush=True)
    facts = {"shape": a.shape, "layers": job.config.layers, "tokens": a.tokens, "doc": a.doc, "remat": a.remat}
    keep(a.json, "single", rows, **facts, master=str(job.master), work=work, apart=apart)
    return rows


def check(a: argparse.Namespace) -> float:
    """Compare losses, norms and every gradient with fstep's, three steps long; return the worst difference."""
    worst = 0.0
    for name in ("small-qwen", "small-llama"):
        for remat in ("none", "full"):
            backend = "inductor" if a.inductor else "eager"
            options: dict[str, Any] = {"low": torch.float32, "remat": remat, "backend": backend, "lr": 1e-3, "keep": True}
            job = Job(shape(name), "cpu", **options)
            batch = make_batch(job, 48, 16)
            todo = builders(job, batch)
            ours, our_grads = todo["fstep"]()
            sides = [s for s in chosen(a.sides, cpu=True) if s != "fstep"]
            with quiet():
                theirs = {s: todo[s]() for s in sides}
            for number in range(COMPARED):
                loss, norm = ours()
                for side, (step, grads) in theirs.items():
                    rows = [
                        (relative(float(x), float(y)), n)
                        for x, y, n in zip(step(), (loss, norm), ("loss", "norm"), strict=True)
                    ]
                    error, what = max([*rows, worst_gradient(grads(), our_grads())])
                    worst = max(worst, error)
                    print(f"{name}, remat {remat}, {side}, step {number}: {what} is off by {error:.1e}", flush=True)
    return worst


def main() -> None:
    """Measure, or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="1.7b", choices=SHAPES)
    p.add_argument("--layers", type=int, help="another number of layers")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--doc", type=int, default=2048, help="tokens of a document")
    p.add_argument("--remat", default="none", choices=["none", "full"])
    p.add_argument(
        "--master", default="float32", choices=["float32", "bfloat16"], help="what params and moments are kept in"
    )
    p.add_argument("--sides", help=f"of {', '.join(SIDES)}; the first is what the others are compared with")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--apart", action="store_true", help="one side after the other, as is done where not all fit at once")
    p.add_argument("--json", type=Path, help="add the result to this file")
    p.add_argument("--check", action="store_true", help="compare on the CPU")
    p.add_argument("--inductor", action="store_true", help="with --check: really compile")
    a = p.parse_args()
    if a.check:
        worst = check(a)
        print(f"worst {worst:.1e}: {'equal' if worst < BOUND else 'DIFFERENT'}")
        raise SystemExit(worst >= BOUND)
    if not on_gpu():
        raise SystemExit("there is no GPU here; --check compares on the CPU")
    job = Job(shape(a.shape, a.layers), "cuda", master=getattr(torch, a.master), remat=a.remat)
    measure(job, chosen(a.sides, cpu=False), a)


if __name__ == "__main__":
    main()
