"""How cost grows: tokens/s of a step against the length of documents, the number of microbatches, of layers, of ranks.

    python benchmarks/growth.py --json FILE                             documents, microbatches, layers, on one GPU (or CPU)
    torchrun --nproc-per-node N benchmarks/growth.py --json FILE        one point of the ranks, parameters cut over them
    python benchmarks/growth.py --check                                 float64, small: what must not change does not

    documents        the same tokens, cut into longer documents: attention grows with their length, the rest does not
    microbatches     1 .. 16 rows a step: gradients are added up in place, so tokens/s should not fall
    layers           2 .. 16 of one shape: tokens/s should fall like 1 / layers, less what embedding and head cost
    ranks            as many tokens on each; tokens/s of all should rise like the ranks

`benchmarks/draw.py FILE` draws the lines and writes their slopes. Blocks run as they are, unless ``--compile``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import in_turns, keep, machine, on_gpu, table
from torch import Tensor

import fstep
from fstep.tree import tree_leaves, tree_map
from fstep_models.dense import Config, Dense

Step = Callable[[], tuple[Tensor, Any]]
BOUND = 1e-11  # of --check, in float64


@dataclasses.dataclass(frozen=True)
class Size:
    """What is held fixed, and what grows."""

    dim: int
    head_dim: int
    vocab: int
    tokens: int  # of a microbatch
    few: int  # layers, where something else grows
    documents: tuple[int, ...]
    microbatches: tuple[int, ...] = (1, 2, 4, 8, 16)
    layers: tuple[int, ...] = (2, 4, 8, 16)


GPU = Size(2048, 128, 32000, 32768, 2, (512, 1024, 2048, 4096, 8192, 16384, 32768))
CPU = Size(128, 32, 512, 2048, 2, (64, 128, 256, 512, 1024, 2048))
CHECK = Size(32, 16, 31, 48, 2, (6, 12, 24, 48), (1, 2, 4), (1, 2, 3))


def make_model(size: Size, layers: int, compiled: bool, low: torch.dtype | None) -> Dense:
    """Return a Llama of so many layers."""
    heads = size.dim // size.head_dim
    config = Config(
        family="llama", vocab=size.vocab, dim=size.dim, ffn=3 * size.dim, layers=layers, heads=heads,
        kv_heads=max(heads // 2, 1), head_dim=size.head_dim, rope=fstep.Rope(theta=500000.0, dim=size.head_dim),
        windows=(0,) * layers,
    )  # fmt: skip
    return Dense(config, dtype=low, compile=compiled)


def rows(size: Size, lengths: Sequence[Sequence[int]], device: str, rank: int = 0) -> list[fstep.Packed]:
    """Return a packed row for each list of lengths; the tokens depend on where they stand, not on how they are cut."""
    key = fstep.Key.seed(1).fold_in(rank)
    total = sum(map(sum, lengths))
    rest = (key.uniform((total,)) * size.vocab).long()
    packed = []
    for row in lengths:
        mine, rest = rest[: sum(row)], rest[sum(row) :]
        packed.append(fstep.to_device(fstep.pack_thd(fstep.make_docs(torch.split_with_sizes(mine, list(row)))), device))
    return packed


def by_fstep(model: Dense, params: Any, batch: Sequence[fstep.Packed], mesh: fstep.Mesh) -> Step:
    """Return a step, which returns the mean loss and the gradients."""
    cut = fstep.shard_params(params, mesh.dp, dtype=model.dtype, reduce_dtype=torch.float32 if model.dtype else None)
    kept = {"state": fstep.init_state(cut, fstep.adamw)}
    stage = model.stage()

    def loss_fn(p: Any, x: Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(p, x, mb), mb.weights)

    def step() -> tuple[Tensor, Any]:
        state = kept.pop("state")
        loss, grads = fstep.pp_forward_backward(stage, loss_fn, state.params, batch)
        grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=1.0, donate=True)
        kept["state"] = fstep.adamw.update(state, grads, lr=1e-5, skip=metrics["nonfinite"], donate=True)
        return metrics["loss"], grads

    return step


def points(size: Size) -> list[tuple[str, int, int, list[list[int]], float | None]]:
    """List (series, what grows, layers, lengths of the documents of each row, the slope hoped for)."""
    doc = size.documents[len(size.documents) // 2]
    row = [doc] * (size.tokens // doc)
    found: list[tuple[str, int, int, list[list[int]], float | None]] = []
    found += [("documents, tokens of each", n, size.few, [[n] * (size.tokens // n)], None) for n in size.documents]
    found += [("microbatches", m, size.few, [row] * m, 0) for m in size.microbatches]
    found += [("layers", n, n, [row], -1) for n in size.layers]
    return found


def measure(a: argparse.Namespace, size: Size, mesh: fstep.Mesh, device: str) -> None:
    """Time every point of the series, or, on ranks, the one point that this many are."""
    low = torch.bfloat16 if device == "cuda" else None
    todo = points(size)
    if mesh.size > 1 or "WORLD_SIZE" in os.environ:
        doc = size.documents[len(size.documents) // 2]
        todo = [("ranks", mesh.size, size.layers[-2], [[doc] * (size.tokens // doc)], 1)]
    for series, x, layers, lengths, ideal in todo:
        if a.only and not series.startswith(a.only):
            continue
        model = make_model(size, layers, a.compile, low)

        def build(model: Dense = model, lengths: list[list[int]] = lengths) -> Callable[[], Any]:
            params = model.init(fstep.Key.seed(0), device=device)
            return by_fstep(model, params, rows(size, lengths, device, mesh.rank), mesh)

        # One core of a CPU may have others' work to do as well.
        clock = time.perf_counter if on_gpu() or mesh.size > 1 else time.process_time
        found = in_turns({"fstep": build}, steps=a.steps, warmup=2, clock=clock)
        tokens = sum(map(sum, lengths)) * mesh.size
        if mesh.rank == 0:
            print(f"\n{series} {x}\n\n{table(found, work=tokens)}", flush=True)
        about = f"dim {size.dim}, {layers} layers, rows of {size.tokens} tokens"
        if series == "layers":
            about = f"dim {size.dim}, rows of {size.tokens} tokens"
        facts = {"series": series, "x": x, "tokens": tokens, "about": about, "ideal": ideal}
        keep(a.json, f"growth: {series} {x}", found, **facts)


def worst(a: Any, b: Any) -> float:
    """Return the largest relative difference of two leaves."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def check(size: Size) -> None:
    """Microbatches of the same documents give the same step; ranks give the step of one; documents and layers run."""
    model = make_model(size, size.few, False, None)
    params = model.init(fstep.Key.seed(0), dtype=torch.float64)
    docs = [[6] * (size.tokens // 6)]
    expected = by_fstep(model, tree_map(torch.clone, params), rows(size, docs, "cpu"), fstep.Mesh())()
    for m in size.microbatches:
        cut = [[6] * (size.tokens // 6 // m)] * m
        error = worst(by_fstep(model, tree_map(torch.clone, params), rows(size, cut, "cpu"), fstep.Mesh())(), expected)
        print(f"{m} microbatches: worst relative difference of the loss or a gradient {error:.1e}", flush=True)
        if not error < BOUND:
            raise SystemExit(f"{m} microbatches differ by {error:.1e} from one")
    for ranks in (2, 4):

        def on_ranks(mesh: fstep.Mesh, ranks: int = ranks) -> Any:
            all_rows = rows(size, [[6] * (size.tokens // 6 // ranks)] * ranks, "cpu")
            loss, grads = by_fstep(model, tree_map(torch.clone, params), [all_rows[mesh.rank]], mesh)()
            return loss, fstep.unshard_params(grads)

        error = max(worst(found, expected) for found in fstep.simulate(on_ranks, dp=ranks))
        print(f"{ranks} ranks: worst relative difference of the loss or a gradient {error:.1e}", flush=True)
        if not error < BOUND:
            raise SystemExit(f"{ranks} ranks differ by {error:.1e} from one")
    for series, x, layers, lengths, _ in points(size):
        model = make_model(size, layers, False, None)
        loss, _ = by_fstep(model, model.init(fstep.Key.seed(0)), rows(size, lengths, "cpu"), fstep.Mesh())()
        if not loss.isfinite():
            raise SystemExit(f"{series} {x}: the loss is {float(loss)}")
    print(f"{len(points(size))} points run")


def main() -> None:
    """Measure the series, or check."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--only", default="", help="one series: documents, microbatches, layers, ranks")
    p.add_argument("--compile", action="store_true", help="run the blocks through torch.compile")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="compare on the CPU, small, float64")
    a = p.parse_args()
    if a.check or not on_gpu():
        torch.set_num_threads(1)
    if a.check:
        check(CHECK)
        return
    device = "cuda" if on_gpu() else "cpu"
    with fstep.mesh_from_env(backend=None if on_gpu() else "gloo") as mesh:
        if mesh.rank == 0:
            print(machine())
        measure(a, GPU if on_gpu() else CPU, mesh, device)


if __name__ == "__main__":
    main()
