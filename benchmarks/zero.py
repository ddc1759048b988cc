"""A training step with parameters cut over the ranks: fstep beside FSDP2 and torchtitan, in one run.

    torchrun --nproc-per-node 4 benchmarks/zero.py                      Llama-3-8B, 8192 tokens a rank in documents of 2048
    torchrun --nproc-per-node 4 benchmarks/zero.py --doc 8192           one document a rank, as torchtitan has it
    torchrun --nproc-per-node 2 benchmarks/zero.py --check              small, float32, gloo: losses, norms, every gradient

    fstep       shard_params and fold_layers
    same        FSDP2 around a module that calls the same functions (peers_sharded.py)
    fsdp2       FSDP2 around layers and a head written with torch alone, each layer compiled
    titan       torchtitan 0.2.2: its module, compiled and sharded by its own functions

All start from the same weights and documents, keep float32 parameters and moments, compute in bfloat16, sum gradients in
float32 (or ``--reduce bfloat16``), clip to norm 1 and take a step of fused AdamW. Losses and norms of three steps are
compared, then steps are timed in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from job import Job, Named, Step, flops, llama, relative, shape, worst_gradient
from measure import in_turns, keep, machine, on_gpu, sync, table
from peers_sharded import by_hand, fsdp2, same, titan
from sides import Guarded, pick
from torch import Tensor

import fstep
from fstep.tree import tree_leaves, tree_paths

SIDES = ("fstep", "same", "fsdp2", "titan")


def make_batch(job: Job, tokens: int, doc: int, rank: int) -> fstep.Packed:
    """Draw this rank's documents."""
    key = fstep.Key.seed(1).fold_in(rank)
    docs = [(key.fold_in(i).uniform((doc,)) * job.config.vocab).long() for i in range(tokens // doc)]
    return fstep.to_device(fstep.pack_thd(fstep.make_docs(docs, vocab_size=job.config.vocab)), job.device)


def by_fstep(job: Job, batch: fstep.Packed, mesh: fstep.Mesh, reduce: torch.dtype) -> tuple[Step, Any]:
    """Return fstep's step, as a user writes it."""
    low = None if job.low == job.master else job.low
    model = job.model
    cut = fstep.shard_params(job.params(), mesh.dp, dtype=low, reduce_dtype=reduce)
    kept: dict[str, Any] = {"state": fstep.init_state(cut, fstep.adamw)}

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.Ratio(-model.logprob_sum(p, x, mb), mb.weights.sum())

    def step() -> tuple[Tensor, Tensor]:
        state = kept.pop("state")
        loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, state.params, [batch])
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
        if job.keep:
            kept["grads"] = grads
        kept["state"] = fstep.adamw.update(state, grads, lr=job.lr, skip=metrics["nonfinite"], donate=True)
        return metrics["loss"], metrics["grad_norm"]

    def grads() -> Named:
        whole = fstep.unshard_params(kept["grads"])
        return dict(zip(tree_paths(whole), tree_leaves(whole), strict=True))

    return step, grads


def builders(job: Job, batch: fstep.Packed, mesh: fstep.Mesh, reduce: torch.dtype) -> dict[str, Any]:
    """Return each side's builder of ``(step, grads)``."""
    return {
        "fstep": lambda: by_fstep(job, batch, mesh, reduce),
        "same": lambda: fsdp2(job, batch, same, reduce),
        "fsdp2": lambda: fsdp2(job, batch, by_hand, reduce),
        "titan": lambda: titan(job, batch, reduce),
    }


def whole_loss(side: str, loss: Tensor, mesh: fstep.Mesh) -> Tensor:
    """Return the mean over all ranks: fstep's is that, torchtitan's a rank's part of it, FSDP2's a rank's own mean."""
    if side == "fstep":
        return loss
    summed: Tensor = fstep.psum(loss.detach(), axis=mesh.dp)
    return summed if side == "titan" else summed / mesh.size


def check(mesh: fstep.Mesh, sides: list[str]) -> None:
    """Take three steps with each, small; compare losses, norms and, of those that have our names, every gradient."""
    job = Job(shape("small-llama"), "cpu", low=torch.float32, backend=None, lr=1e-3, keep=True)
    batch = make_batch(job, 96, 24, mesh.rank)
    made = {name: build() for name, build in builders(job, batch, mesh, torch.float32).items() if name in sides}
    worst = 0.0
    for number in range(3):
        out = {name: step() for name, (step, _) in made.items()}
        loss, norm = (float(x) for x in out["fstep"])
        ours = made["fstep"][1]()
        for name in sides[1:]:
            off = {"loss": relative(float(whole_loss(name, out[name][0], mesh)), loss)}
            off["norm"] = relative(float(out[name][1]), norm)
            error, path = worst_gradient(made[name][1](), ours)
            off[path] = error
            where = max(off, key=lambda key: off[key])
            worst = max(worst, off[where])
            print(
                f"step {number}: loss {loss:.6f}, norm {norm:.4f}; {name} is off by {off[where]:.1e} in {where}", flush=True
            )
    print(f"worst {worst:.1e}: {'equal' if worst < 1e-5 else 'DIFFERENT'}")
    raise SystemExit(worst >= 1e-5)


def sustained(seconds: float = 2.0) -> float:
    """Measure what the card does of matrix products of this model for so long, in operations a second."""
    x, w = (torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16) for n in (8192, 14336))
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(50):
            x @ w.T
        calls += 50
        sync()
    return calls * 2.0 * 8192 * 4096 * 14336 / (time.perf_counter() - start)


def main() -> None:
    """Measure and print the table, or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sides", help=f"of {', '.join(SIDES)}")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--vocab", type=int, default=128256)
    p.add_argument("--tokens", type=int, default=8192, help="of each rank")
    p.add_argument("--doc", type=int, default=2048, help="tokens of a document")
    p.add_argument("--reduce", default="float32", choices=["float32", "bfloat16"], help="what gradients are summed in")
    p.add_argument("--remat", default="none", choices=["none", "full"])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--burst", type=int, default=5, help="steps of one side in a row")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="compare gradients on the CPU, small, float32")
    a = p.parse_args()
    with fstep.mesh_from_env(backend="gloo" if a.check else None) as mesh:
        if mesh.size == 1:
            raise SystemExit("run it under torchrun with 2 or more processes")
        if mesh.rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the process ends
        sides = pick(a.sides, SIDES, SIDES, {"titan": "torchtitan"})
        if a.check:
            check(mesh, [side for side in sides if side != "titan"])  # which wants a sum that gloo has not
        measure(a, mesh, sides)


def measure(a: argparse.Namespace, mesh: fstep.Mesh, sides: list[str]) -> None:
    """Time the sides in turns and print the table on rank 0."""
    job = Job(llama(4096, 14336, 32, a.layers, a.vocab), "cuda", remat=a.remat)
    batch = make_batch(job, a.tokens, a.doc, mesh.rank)
    guard = Guarded(3)
    made = builders(job, batch, mesh, getattr(torch, a.reduce))
    rate = sustained() if on_gpu() else 0.0
    # torchtitan's first: while it is built there are two whole models in memory.
    order = sorted(sides, key=lambda name: name != "titan")
    rows = in_turns({name: guard.side(name, made[name]) for name in order}, steps=a.steps, burst=a.burst)
    rows.sort(key=lambda row: sides.index(row.name))
    work = flops(job.config, [a.doc] * (a.tokens // a.doc))
    for name in sides:
        guard.seen[name] = [(whole_loss(name, loss, mesh), norm) for loss, norm in guard.seen[name]]
    noted = [
        dataclasses.replace(row, notes={"TFLOP/s": f"{work / row.median / 1e12:.0f}", **guard.errors(row.name, sides[0])})
        for row in rows
        if row.name not in guard.failed
    ]
    about = (
        f"{a.layers} layers, {a.tokens} tokens a rank in documents of {a.doc}, vocabulary {a.vocab}, sums in {a.reduce}, "
        f"remat {a.remat}"
    )
    print(f"{machine()}; {about}; matrix products alone {rate / 1e12:.0f} TFLOP/s")
    print(table(noted, work=a.tokens, unit="tokens/s/GPU"))
    keep(a.json, f"zero, documents of {a.doc}", noted, about=about, sustained=rate)


if __name__ == "__main__":
    main()
