"""Pipelines: fstep beside torch.distributed.pipelining, the same stages, weights and microbatches on the same ranks.

    torchrun --nproc-per-node 4 benchmarks/pipeline.py              layers of an 8B Llama, 4096 tokens a microbatch, bf16
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --check      tiny, on the CPU, float64: do all gradients agree?

Before anything is timed, that is asked on the GPUs too.

A model of layers only, so that all stages cost the same, which is what the tables of schedules assume. Both sides run the
same block and loss, compiled, except for the peer's zero-bubble schedules: they go through a graph twice, which what is
compiled does not allow, so that they run it eagerly.

    idle    1 - m * t / (p * step), t a microbatch of the whole model on one GPU in the same run
    table   the idle share of the schedule itself, if messages take no time, with F, B, I, W as measured on one stage
    over    the difference, in points
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Step, in_turns, keep, machine, on_gpu, sync, table
from pipeline_sides import RACES, Layers, Params, Race, Shape, Work, alone, block, fstep_side, torch_side
from torch.autograd.graph import get_gradient_edge
from torch.distributed import pipelining

import fstep
from fstep.grad.by_name import schedule_for
from fstep.grad.halves import backward_halves, backward_whole


def everywhere(x: float, op: Any = dist.ReduceOp.SUM) -> float:
    """Reduce a number over the ranks."""
    value = torch.tensor(x, dtype=torch.float64, device="cuda" if on_gpu() else "cpu")
    dist.all_reduce(value, op=op)
    return float(value)


def seconds(f: Callable[[], Any], times: int = 8) -> float:
    """Return the median seconds of a call, the mean of the ranks, all at work at the same time as in a pipeline."""
    taken = []
    for number in range(times + 2):
        sync()
        start = time.perf_counter()
        f()
        sync()
        taken.append(time.perf_counter() - start if number >= 2 else 0.0)
    return everywhere(statistics.median(taken[2:])) / dist.get_world_size()


def costs_of(work: Work, count: int) -> dict[str, float]:
    """Measure the four kinds of actions on a stage of ``count`` layers in the middle of the model."""
    layers = work.layers(range(count))
    leaves = [w.requires_grad_() for w in fstep.tree_leaves(layers)]
    x, cotangent = work.data[0][0].detach().requires_grad_(), work.data[0][1]
    taken: dict[str, list[float]] = {k: [] for k in "FBIW"}

    def timed(kind: str, f: Callable[[], Any]) -> Any:
        sync()
        start = time.perf_counter()
        found = f()
        sync()
        taken[kind].append(time.perf_counter() - start)
        return found

    forward = partial(work.run, layers, x, work.ours)
    for _ in range(8):
        edges = [get_gradient_edge(timed("F", forward))]
        timed("B", partial(backward_whole, edges, [cotangent], [*leaves, x]))
        edges = [get_gradient_edge(timed("F", forward))]
        _, later = timed("I", partial(backward_halves, edges, [cotangent], [x], leaves))
        del edges
        timed("W", later)
        x.grad = None
    ranks = dist.get_world_size()
    return {k: everywhere(statistics.median(found[3:])) / ranks for k, found in taken.items()}


def compare(got: dict[int, Params], want: Layers) -> float:
    """Return the worst relative error of this rank's gradients, over all ranks; something missing counts as infinite."""
    worst = 0.0 if got else float("inf")
    for i, layer in got.items():
        for n, g in layer.items():
            if g is None:
                return everywhere(float("inf"), dist.ReduceOp.MAX)
            a, b = g.detach().double(), want[i][n].double()
            error = float((a - b).norm() / b.norm())
            worst = max(worst, error if error == error else float("inf"))
    return everywhere(worst, dist.ReduceOp.MAX)


def free() -> None:
    """Give memory back."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


class Bench:
    """One run of this script."""

    def __init__(self, work: Work, mesh: fstep.Mesh, args: argparse.Namespace) -> None:
        self.work, self.mesh, self.args = work, mesh, args
        self.failed = False

    def say(self, *what: Any) -> None:
        """Print on one rank."""
        if self.mesh.rank == 0:
            print(*what, flush=True)

    def reference(self) -> None:
        """Measure a microbatch of the whole model on one GPU, compiled and eager, and keep gradients to compare with."""
        step = alone(self.work, self.work.compiled)
        self.want = fstep.tree_map(torch.clone, step(self.args.microbatches[0]))
        if not self.args.time:
            return
        eager = alone(self.work, block)
        self.t = {True: seconds(lambda: step(1)), False: seconds(lambda: eager(1))}
        self.say(
            f"a microbatch of the whole model on one GPU: {self.t[True] * 1e3:.1f} ms, eager {self.t[False] * 1e3:.1f} ms"
        )
        free()
        self.costs = costs_of(self.work, max(1, self.work.shape.layers // (2 * self.mesh.pp.size)))
        self.say("a stage:", ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in self.costs.items()))

    def sides(self, race: Race, number: int) -> dict[str, Callable[[], Step]]:
        """Return the two sides of a race; the peer's is left out where this torch has it not."""
        make: dict[str, Callable[..., Step]] = {"fstep": fstep_side}
        if hasattr(pipelining, race.theirs):
            make[f"torch {race.theirs}" + ("" if race.compiled else ", eager")] = torch_side
        return {name: partial(f, self.work, race, number, self.mesh) for name, f in make.items()}

    def agree(self, race: Race) -> dict[str, float]:
        """Compare each side's gradients with those of one process; a side that fails is left out of the race."""
        errors = {}
        for name, build in self.sides(race, self.args.microbatches[0]).items():
            try:
                errors[name] = compare(build()(), self.want)
            except Exception:
                print(f"{race.name}, {name}, rank {self.mesh.rank}: {traceback.format_exc()[-1500:]}", flush=True)
                errors[name] = float("inf")
            # In bfloat16 gradients are added up in bfloat16, where torch's own eager pipeline is off by 0.09.
            good = errors[name] <= (1e-10 if self.args.check else 0.15)
            self.failed |= not good
            self.say(f"{race.name}, {name}: worst error of a gradient {errors[name]:.1e}{'' if good else '   WRONG'}")
            free()
        return errors

    def race(self, race: Race, number: int, names: list[str]) -> None:
        """Time both sides in turns."""
        p, tokens = self.mesh.pp.size, number * self.work.shape.tokens
        sides = {name: build for name, build in self.sides(race, number).items() if name in names}
        rows = in_turns(sides, steps=self.args.steps, warmup=1)
        own = schedule_for("benchmark", race.ours, p, number).stats(self.costs).idle
        shown = []
        for row in rows:
            idle = 1 - number * self.t["eager" not in row.name] / (p * row.median)
            notes = {"idle": f"{idle:.1%}", "table": f"{own:.1%}", "over": f"{(idle - own) * 100:+.1f}"}
            shown.append(dataclasses.replace(row, notes=notes))
        self.say(f"\n{race.name}, p={p}, m={number}\n\n{table(shown, work=tokens)}")
        if len(rows) == 2:
            self.say(f"\nfstep: {rows[1].median / rows[0].median:.3f}x tokens/s")
        facts = {
            "tokens": tokens,
            "microbatches": number,
            "reference": self.t[True],
            "eager": self.t[False],
            "costs": self.costs,
        }
        keep(self.args.json, f"pipeline {race.name} m={number}", shown, **facts)
        self.trace(sides, f"{race.name} {number}")
        free()

    def trace(self, sides: dict[str, Callable[[], Step]], title: str) -> None:
        """Write what every rank's device did in one step of each side, to look at."""
        if self.args.trace is None:
            return
        self.args.trace.mkdir(parents=True, exist_ok=True)
        for name, build in sides.items():
            step = build()
            step()
            with torch.profiler.profile() as profile:
                step()
                sync()
            profile.export_chrome_trace(str(self.args.trace / f"{title} {name} rank {self.mesh.rank}.json"))

    def __call__(self) -> None:
        """Compare, then race."""
        s = self.work.shape
        self.say(
            f"{machine()}; {s.layers} layers of {s.dim}, {s.tokens} tokens a microbatch in documents of {s.doc}, {s.dtype}"
        )
        self.reference()
        races = [race for race in RACES if not self.args.only or race.name in self.args.only]
        errors = {race: self.agree(race) for race in races}
        del self.want
        free()
        for number in self.args.microbatches if self.args.time else ():
            for race in races:
                if race.extra and number != self.args.microbatches[0]:
                    continue
                fine = [name for name, error in errors[race].items() if error < 1]
                self.race(race, number, fine)


def main() -> None:
    """Run the benchmark in every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny sizes on the CPU in float64; compare gradients only")
    parser.add_argument("--time", action="store_true", help="with --check: go through the timing as well")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(race.name for race in RACES)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="a folder for one step's trace of every side and rank")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit("run it under torchrun with 2 or more processes")
    small = Shape(32, 48, 4, 2, 8, 12, 6, torch.float64)
    exact = argparse.Namespace(**{**vars(args), "microbatches": [4], "check": True, "trace": None})
    if args.check:
        shape, args = small, exact
    else:
        args.time = True
        shape = Shape(4096, 14336, 32, 8, args.layers, args.tokens, min(2048, args.tokens), torch.bfloat16)
    with fstep.mesh_from_env(pp=int(os.environ["WORLD_SIZE"]), timeout=240, backend="gloo" if args.check else None) as mesh:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu() and not args.check else torch.device("cpu")
        first = Bench(Work(small, 4, device), mesh, argparse.Namespace(**{**vars(exact), "time": False}))
        if not args.check:  # on this device too, in float64
            first()
            # The compiler remembers those sizes, and would make all sizes variables of the kernels that are timed.
            torch._dynamo.reset()
        bench = Bench(Work(shape, max(args.microbatches), device), mesh, args)
        bench()
    if bench.failed or first.failed:
        raise SystemExit("gradients do not agree")


if __name__ == "__main__":
    main()
