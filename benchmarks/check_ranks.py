"""Does a step on ranks equal the step on one? Compares every gradient leaf, in float64.

    torchrun --nproc-per-node 4 benchmarks/check_ranks.py                      every mesh of 4 ranks; NCCL or gloo
    torchrun --nproc-per-node 4 benchmarks/check_ranks.py --pp 2 --cp 2        this one, with the error of each leaf
    python benchmarks/check_ranks.py --simulate 8                              the ranks are threads of one process

Every rank computes the whole step alone as well, from the same documents, and compares what it holds. NCCL where each
process has a GPU of its own, else gloo.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from functools import partial
from typing import Any

import torch

import fstep
from fstep_models.dense import Config, Dense

CONFIG = Config(
    family="qwen3", vocab=211, dim=64, ffn=96, layers=8, heads=4, kv_heads=2, head_dim=16,
    rope=fstep.Rope(theta=10000.0, dim=16), windows=(0, 9, 0, 0, 0, 33, 0, 0), tied=True, qk_norm=True, init_std=0.1,
)  # fmt: skip
LENGTHS = [70, 3, 41, 1, 18, 96, 33, 2, 57, 12, 12, 5]
SCHEDULES = ("1f1b", "interleaved", "zbv", "interleaved_zero_bubble", "gpipe", "dualpipev")
Rows = dict[str, float]


def step(mesh: fstep.Mesh, device: str, schedule: str, zero: bool) -> tuple[Any, Any, Any, Any]:
    """Return new params, gradients and metrics of one step over uneven documents, one masked, and an evaluation."""
    key = fstep.Key.seed(0)
    tokens = [(key.fold_in(i).uniform((n,)) * CONFIG.vocab).long() for i, n in enumerate(LENGTHS)]
    weights = [key.fold_in(-i - 1).uniform((n,), dtype=torch.float64) * (i != 5) for i, n in enumerate(LENGTHS)]
    docs = fstep.make_docs(tokens, weights=weights)
    model = Dense(CONFIG)
    params = model.init(key, mesh=mesh, schedule=schedule, dtype=torch.float64, device=device)
    data = mesh.over("dp", "cp")
    if zero:
        params = fstep.shard_params(params, data)
    parts = fstep.split_microbatches(docs, num=8, axis=mesh.dp)
    packed = [fstep.cp_shard(fstep.pack_thd(mb, multiple_of=2 * mesh.cp.size), axis=mesh.cp) for mb in parts]
    batch = [fstep.to_device(mb, device) for mb in packed]

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(params, x, mb, mesh=mesh), mb.weights)

    run: dict[str, Any] = {"axis": mesh.pp, "schedule": schedule}
    loss, grads = fstep.pp_forward_backward(model.stage(mesh), loss_fn, params, batch, **run)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=0.1)
    new = fstep.sgd.update(fstep.init_state(params, fstep.sgd), grads, lr=0.1).params
    ratios = fstep.pp_forward(model.stage(mesh), loss_fn, new, batch, **run)
    return new, grads, metrics, fstep.psum(sum(ratios[1:], ratios[0]), axis=data).mean()


def compare(mesh: fstep.Mesh, device: str, schedule: str = "1f1b", zero: bool = False) -> Rows:
    """Return the relative error of metrics, evaluation, and of every gradient and new parameter, the worst of all ranks."""
    ours, alone = step(mesh, device, schedule, zero), step(fstep.Mesh(), device, "1f1b", False)
    rows: Rows = {}
    for name, tree, whole in zip(("params", "grads", "metrics", "evaluation"), ours, alone, strict=True):
        by_path = dict(zip(fstep.tree_paths(whole), fstep.tree_leaves(whole), strict=True))
        for place, x in zip(fstep.places(tree), fstep.tree_leaves(tree), strict=True):
            y = by_path[place.path]
            size = y.double().norm().clamp(min=1e-300)
            rows[f"{name}.{place.path}"] = float((x - place.cut(y)).double().norm() / size)
    # Ranks hold different leaves: each tells all what it found.
    names = sorted(
        f"{kind}.{path}" for kind, t in zip(("params", "grads"), alone, strict=False) for path in fstep.tree_paths(t)
    )
    names += sorted(n for n in rows if n not in names)
    mine = torch.tensor([rows.get(n, 0.0) for n in names], dtype=torch.float64, device=device)
    everybody = mesh.over("pp", "dp", "ep", "cp", "tp")
    return dict(zip(names, fstep.pmax(mine, axis=everybody).tolist(), strict=True))


def meshes(ranks: int) -> list[dict[str, int]]:
    """List the meshes of so many ranks."""
    each = [n for n in (1, 2, 4, 8) if n <= ranks]
    sizes = [dict(zip(("dp", "pp", "cp", "tp"), s, strict=True)) for s in itertools.product(each, each, each, each)]
    return [s for s in sizes if s["dp"] * s["pp"] * s["cp"] * s["tp"] == ranks and s["tp"] <= CONFIG.heads and s["pp"] <= 4]


def runs_on(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """List how a mesh is tried: every schedule if there is a pipeline, and ZeRO if there is somebody to shard over."""
    schedules = SCHEDULES if sizes["pp"] > 1 else SCHEDULES[:1]
    out: list[dict[str, Any]] = [{"schedule": s, "zero": False} for s in schedules]
    return out + ([{"schedule": schedules[0], "zero": True}] if sizes["dp"] * sizes["cp"] > 1 else [])


def report(say: Any, sizes: dict[str, int], how: dict[str, Any], rows: Rows, seconds: float) -> float:
    """Print a line of the table."""
    worst = max(rows, key=lambda n: rows[n])
    mesh = " ".join(f"{k}{v}" for k, v in sizes.items() if v > 1)
    what = how["schedule"] if sizes["pp"] > 1 else "-"
    say(f"| {mesh} | {what} | {'yes' if how['zero'] else ''} | {rows[worst]:.1e} | {worst} | {seconds:.1f} |")
    return rows[worst]


def main() -> None:
    """Compare, and print the table on the first rank."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--simulate", type=int, default=0, help="threads as ranks, this many")
    for axis in ("dp", "pp", "cp", "tp"):
        p.add_argument(f"--{axis}", type=int, default=0)
    p.add_argument("--schedule", default="1f1b")
    p.add_argument("--zero", action="store_true")
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = a.simulate or int(os.environ.get("WORLD_SIZE", "1"))
    one = {axis: getattr(a, axis) or 1 for axis in ("dp", "pp", "cp", "tp")}
    single = any(getattr(a, axis) for axis in one)
    todo = (
        [(one, {"schedule": a.schedule, "zero": a.zero})]
        if single
        else [(s, how) for s in meshes(ranks) for how in runs_on(s)]
    )
    if not a.simulate and "RANK" not in os.environ:
        raise SystemExit("run it under torchrun, or with --simulate and a number of ranks")
    lead = int(os.environ.get("RANK", "0")) == 0
    say: Any = print if lead else lambda *_: None
    if not a.simulate:
        import torch.distributed as dist

        gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")  # once, for all meshes
    say(f"{ranks} ranks, {device}, torch {torch.__version__}\n")
    say("| mesh | schedule | ZeRO | worst relative error | at | seconds |\n|---|---|---|---|---|---|")
    errors = []
    for sizes, how in todo:
        began = time.perf_counter()
        if a.simulate:
            rows = fstep.simulate(partial(compare, device=device, **how), **sizes)[0]
        else:
            with fstep.mesh_from_env(**sizes) as mesh:
                rows = compare(mesh, device, **how)
        errors.append(report(say, sizes, how, rows, time.perf_counter() - began))
        if single:
            say("\n| leaf | relative error |\n|---|---|\n" + "\n".join(f"| {n} | {e:.1e} |" for n, e in rows.items()))
    say(f"\nworst {max(errors):.1e}: {'equal' if max(errors) < 1e-10 else 'DIFFERENT'}")
    if not a.simulate:
        dist.destroy_process_group()
    raise SystemExit(max(errors) >= 1e-10)


if __name__ == "__main__":
    main()
