"""The end of a step beside torch's: finalize_grads and a donated adamw.update, clip_grad_norm_ and torch.optim.AdamW fused.

    python benchmarks/optimizer.py             Qwen3-1.7B whole, and a quarter of Llama-8B as ZeRO cuts it, float32
    python benchmarks/optimizer.py --probe     how fast torch's own kernels go through the leaves, all at once and one by one
    python benchmarks/optimizer.py --check     float64, small, on the CPU: params and moments of three steps compared

    bytes of a parameter     norm   scale   is it finite?   AdamW
    torch                      4      8                       28      40
    fstep, told                4      8                       28      40     update(skip=metrics["nonfinite"])
    fstep, looks               4      8          4            28      44     update without skip
    fstep, pure                4      8                  24 + 28      64     nothing donated but the gradients

Both start from the same tensors; each works on its own. torch divides by the batch's weight in the graph of the loss, fstep
in its one multiplication. Steps follow one another as in training, where the CPU runs ahead of a GPU; "CPU us" is how long a
call alone takes to return. Memory is the peak above what lies there between steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from measure import in_turns, keep, machine, on_gpu, sync, table
from torch import Tensor

import fstep
from fstep.tree import tree_leaves, tree_paths, tree_replace_leaves
from fstep_models.dense import Config, Dense

Step = Callable[[], Any]
LR, MAX_NORM = 1e-4, 1.0
BOUND = 1e-6
BYTES = {"torch": 40, "told": 40, "looks": 44, "pure": 64}
QWEN = Config(
    family="qwen3", vocab=151936, dim=2048, ffn=6144, layers=28, heads=16, kv_heads=8, head_dim=128,
    rope=fstep.Rope(theta=1000000.0, dim=128), windows=(0,) * 28, tied=True, qk_norm=True,
)  # fmt: skip
LLAMA = Config(
    family="llama", vocab=128256, dim=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
    rope=fstep.Rope(theta=500000.0, dim=128), windows=(0,) * 32,
)  # fmt: skip
SMALL = Config(
    family="qwen3", vocab=131, dim=48, ffn=80, layers=3, heads=4, kv_heads=2, head_dim=12,
    rope=fstep.Rope(theta=10000.0, dim=12), windows=(0,) * 3, qk_norm=True,
)  # fmt: skip


def shapes(config: Config, ranks: int) -> Any:
    """Return a tree of meta tensors: the params, or what the second of ``ranks`` holds of them."""
    spec = Dense(config).spec()
    whole = tree_replace_leaves(spec, [torch.empty(p.shape, device="meta") for p in fstep.places(spec)])
    return fstep.shard_params(whole, fstep.Axis("dp", ranks, 1)) if ranks > 1 else whole


def values(tree: Any, dtype: torch.dtype, device: str, seed: int, scale: float) -> list[Tensor]:
    """Return random leaves for a tree of meta tensors; 1-D pieces of one layer are views of one buffer, as in ZeRO."""
    torch.manual_seed(seed)

    def draw(shape: Any) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) * scale

    def unit(item: tuple[str, Tensor]) -> str:
        return ".".join(item[0].split(".")[:2])

    out: list[Tensor] = []
    for _, members in groupby(zip(tree_paths(tree), tree_leaves(tree), strict=True), key=unit):
        leaves = [leaf for _, leaf in members]
        if all(leaf.ndim == 1 for leaf in leaves):
            sizes = [len(leaf) for leaf in leaves]
            out += torch.split_with_sizes(draw((sum(sizes),)), sizes)
        else:
            out += [draw(leaf.shape) for leaf in leaves]
    return out


def bare(tree: Any) -> Any:
    """Return a tree of the same leaves without ZeRO nodes, since there is one rank here."""
    return dict(zip(tree_paths(tree), tree_leaves(tree), strict=True))


class Sides:
    """Every side of one tree of shapes: its own params and gradients, from the same numbers."""

    def __init__(self, tree: Any, dtype: torch.dtype, device: str) -> None:
        self.tree = bare(tree)
        self.names = list(self.tree)
        self.draw: Callable[[int, float], list[Tensor]] = partial(values, tree, dtype, device)
        # Of weight 1, so that gradients, which are scaled in place at every step, keep their norm.
        one = torch.ones((), dtype=dtype, device=device)
        self.loss = fstep.Ratio(one, one)
        self.mesh = fstep.Mesh()

    def ours(self, kind: str, parts: str = "both", seen: list[Any] | None = None) -> Step:
        """Return a step of fstep: ``told``, ``looks`` or ``pure``, and of which ``parts``: finalize, update or both."""
        params = tree_replace_leaves(self.tree, self.draw(0, 1.0))
        kept = {"state": fstep.init_state(params, fstep.adamw)}
        grads = tree_replace_leaves(self.tree, self.draw(1, 1e-3))
        del params
        zero = torch.zeros((), device=self.loss.den.device)

        def step() -> None:
            new, metrics = grads, {"nonfinite": zero}
            if parts != "update":
                new, metrics = fstep.finalize_grads(grads, self.loss, mesh=self.mesh, max_norm=MAX_NORM, donate=True)
            if parts != "finalize":
                state = kept.pop("state")
                skip = None if kind == "looks" else metrics["nonfinite"]
                kept["state"] = fstep.adamw.update(state, new, lr=LR, skip=skip, donate=kind != "pure")
            if seen is not None:
                s = kept["state"]
                seen[:] = [new, s.params, s.opt.mu, s.opt.nu]

        return step

    def theirs(self, parts: str = "both", seen: list[Any] | None = None) -> Step:
        """Return the same of torch."""
        params = [p.requires_grad_() for p in self.draw(0, 1.0)]
        for p, g in zip(params, self.draw(1, 1e-3), strict=True):
            p.grad = g
        betas, eps = fstep.adamw.betas, fstep.adamw.eps
        opt = torch.optim.AdamW(params, lr=LR, betas=betas, eps=eps, weight_decay=0.0, fused=True)

        def step() -> None:
            if parts != "update":
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            if parts != "finalize":
                opt.step()
            if seen is not None:
                slots = [opt.state[p] for p in params]
                moments = [s["exp_avg"] for s in slots], [s["exp_avg_sq"] for s in slots]
                seen[:] = [[p.grad for p in params], [p.detach() for p in params], *moments]

        return step


def worst(a: Iterable[Any], b: Iterable[Any]) -> tuple[float, int]:
    """Return the largest relative difference of two leaves, and how many were compared."""
    errors = []
    for x, y in zip(tree_leaves(list(a)), tree_leaves(list(b)), strict=True):
        if x.numel():
            errors.append(float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)))
    return max(errors), len(errors)


def compare(sides: Sides, kind: str, steps: int) -> tuple[float, int]:
    """Return how far gradients, params or moments are apart after some steps, and how many leaves were compared."""
    ours: list[Any] = []
    theirs: list[Any] = []
    a, b = sides.ours(kind, seen=ours), sides.theirs(seen=theirs)
    for _ in range(steps):
        a()
        b()
    return worst(ours, theirs)


def issue(build: Callable[[], Step]) -> float:
    """Return the microseconds after which a call returns: the CPU's part, which a GPU that has other work does not see."""
    step = build()
    found = []
    for _ in range(8):
        sync()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    sync()
    return sorted(found)[len(found) // 2] * 1e6


def measure(name: str, tree: Any, a: argparse.Namespace, dtype: torch.dtype, device: str) -> None:
    """Compare, then time each part of the end of a step."""
    sides = Sides(tree, dtype, device)
    some = [x for x in tree_leaves(tree) if x.numel()]
    size, width = sum(x.numel() for x in some), some[0].element_size()
    error, leaves = compare(sides, "told", 2)
    print(f"\n## {name}: {size:,} parameters, {len(sides.names)} leaves, {len(some)} of them not empty")
    print(f"worst relative difference of {leaves} gradients, params and moments after two steps: {error:.1e}", flush=True)
    if not error < BOUND:
        raise SystemExit(f"{name}: the sides differ by {error:.1e}")
    for parts, kinds in (("both", ("told", "looks")), ("update", ("told", "looks")), ("finalize", ("told",))):
        made: dict[str, Callable[[], Step]] = {"torch": partial(sides.theirs, parts)}
        made |= {f"fstep, {kind}": partial(sides.ours, kind, parts) for kind in kinds}
        rows = in_turns(made, steps=a.steps, warmup=3, repeat=4 if on_gpu() else 1)
        for i, row in enumerate(rows):
            trees = 2 if parts == "finalize" and row.name == "torch" else 4  # of the size of the params, between steps
            above = (row.peak - trees * size * width) / 2**20
            notes: dict[str, Any] = {"CPU us": round(issue(made[row.name])), "above state, MiB": round(above)}
            if parts == "both" and on_gpu():
                notes["TB/s"] = round(BYTES[row.name.split()[-1]] * size / row.median / 1e12, 2)
            rows[i] = dataclasses.replace(row, notes=notes)
        what = {"both": "finalize and update", "update": "update", "finalize": "finalize"}[parts]
        print(f"\n{what}\n\n{table(rows)}", flush=True)
        keep(a.json, f"optimizer: {what}, {name}", rows, parameters=size, leaves=len(some))
    if a.pure:
        rows = in_turns({"torch": sides.theirs, "fstep, pure": partial(sides.ours, "pure")}, steps=5, warmup=1)
        print(f"\nfinalize and update, the old state kept\n\n{table(rows)}", flush=True)
        keep(a.json, f"optimizer: the old state kept, {name}", rows, parameters=size, leaves=len(some))


def probe(name: str, tree: Any, a: argparse.Namespace, device: str) -> None:
    """Print how fast the leaves can be read, and read and written, in one call for all and in one for each."""
    leaves = [x for x in values(tree, torch.float32, device, 0, 1.0) if x.numel()]
    size = sum(x.nbytes for x in leaves)
    factor = torch.ones((), device=device)
    calls: dict[str, tuple[int, Step]] = {
        "_foreach_norm": (1, lambda: torch._foreach_norm(leaves, 2)),
        "vector_norm, one by one": (1, lambda: [torch.linalg.vector_norm(x) for x in leaves]),
        "dot, one by one": (1, lambda: [torch.dot(x.view(-1), x.view(-1)) for x in leaves]),
        "_foreach_mul_": (2, lambda: torch._foreach_mul_(leaves, factor)),
        "mul_, one by one": (2, lambda: [x.mul_(factor) for x in leaves]),
    }
    steps = {name: step for name, (_, step) in calls.items()}
    rows = in_turns({name: partial(steps.__getitem__, name) for name in steps}, steps=a.steps, repeat=4)
    rows = [dataclasses.replace(r, notes={"TB/s": round(calls[r.name][0] * size / r.median / 1e12, 2)}) for r in rows]
    print(f"\n## {name}: {len(leaves)} leaves of {size / 2**30:.2f} GiB\n\n{table(rows)}", flush=True)


def main() -> None:
    """Measure both trees, or compare them small."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--only", choices=["whole", "zero"])
    p.add_argument("--pure", action="store_true", help="time the update that keeps the old state, too")
    p.add_argument("--probe", action="store_true", help="time torch's kernels alone")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="compare on the CPU, small, float64")
    a = p.parse_args()
    print(machine())
    if a.check:
        torch.set_num_threads(1)
        for ranks in (1, 4):
            sides = Sides(shapes(SMALL, ranks), torch.float64, "cpu")
            for kind in ("told", "looks", "pure"):
                error, leaves = compare(sides, kind, 3)
                print(f"{ranks} ranks, {kind}: worst of {leaves} leaves {error:.1e}", flush=True)
                if not error < 1e-12:
                    raise SystemExit(f"{ranks} ranks, {kind}: the sides differ by {error:.1e}")
        return
    device = "cuda" if on_gpu() else "cpu"
    whole, part = (QWEN, LLAMA) if on_gpu() else (SMALL, SMALL)
    for key, name, tree in (("whole", "params whole", shapes(whole, 1)), ("zero", "a quarter, by ZeRO", shapes(part, 4))):
        if a.only in (None, key):
            if a.probe:
                probe(name, tree, a, device)
            else:
                measure(name, tree, a, torch.float32, device)


if __name__ == "__main__":
    main()
