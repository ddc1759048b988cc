"""Are fstep's results those of others' code, on the same weights and documents? Prints each one's errors, in float64.

    torchrun --nproc-per-node 2 benchmarks/peers.py                 loss and every gradient; NCCL or gloo
    torchrun --nproc-per-node 4 benchmarks/peers.py --only pipeline
    torchrun --nproc-per-node 4 benchmarks/peers.py --time          the time of a pipeline's step and its memory too

Peers: torch.distributed.pipelining, FSDP2 with torch.optim.AdamW, torch's ring attention, torch.distributed.tensor.parallel.
Each trains a module written with torch alone (peers_model.py) on the batch that fstep gets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers_model import HEAD, Row, make_config
from peers_parallel import sharded, tensor
from peers_pipeline import pipelines, times, uneven
from peers_ring import context

import fstep

PARTS = ("pipeline", "sharded", "context", "tensor")
BOUND = 1e-10


def rows_of(part: str, ranks: int, device: str) -> list[Row]:
    """Run one comparison over all ranks."""
    if part == "pipeline":
        with fstep.mesh_from_env(pp=ranks) as mesh:
            config = make_config(2 * ranks)
            return [*pipelines(mesh, config, device), *uneven(mesh, config, device)]
    if part == "sharded":
        with fstep.mesh_from_env() as mesh:
            return sharded(mesh, make_config(2), device)
    if part == "context":
        with fstep.mesh_from_env(cp=ranks) as mesh:
            return context(mesh, device)
    with fstep.mesh_from_env(tp=ranks) as mesh:
        return tensor(mesh, make_config(2), device)


def main() -> None:
    """Compare, and print the table on the first rank."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=PARTS, action="append")
    p.add_argument("--json", type=Path, help="write the rows here too")
    p.add_argument("--time", action="store_true", help="time the pipelines")
    p.add_argument(
        "--dim", type=int, default=0, help="of the model that is timed, a multiple of 128: 4096 on a GPU, 64 on the CPU"
    )
    p.add_argument("--layers", type=int, default=0, help="likewise: 16, or two a rank")
    p.add_argument("--length", type=int, default=0, help="tokens of a microbatch: 4096, or 48")
    p.add_argument("--microbatches", type=int, default=0, help="four a rank")
    p.add_argument("--steps", type=int, default=5)
    a = p.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("run it under torchrun with 2 or more processes")
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = "cuda" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")  # once, for all meshes
    ranks = dist.get_world_size()
    say: Any = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(f"{ranks} ranks, {device}, torch {torch.__version__}\n\n{HEAD}")
    rows = []
    for part in a.only or PARTS:
        for row in rows_of(part, ranks, device):
            rows.append(row)
            say(row.line(), flush=True)
    worst = max((max(row.loss, row.error) for row in rows if row.equal), default=0.0)
    say(f"\nworst {worst:.1e}: {'equal' if worst < BOUND else 'DIFFERENT'}")
    if a.json is not None and dist.get_rank() == 0:
        a.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    if a.time:
        big = make_config(a.layers or (16 if gpus else 2 * ranks))
        dim = a.dim or (4096 if gpus else 64)
        if dim > 64:
            big = make_config(
                big.layers, dim=dim, heads=dim // 128, kv_heads=max(1, dim // 512), ffn=dim * 7 // 2, vocab=32000
            )
        sizes = {"microbatches": a.microbatches or 4 * ranks, "length": a.length or (4096 if gpus else 48)}
        with fstep.mesh_from_env(pp=ranks) as mesh:
            times(mesh, big, device, steps=a.steps, dtype=torch.bfloat16 if gpus else torch.float32, **sizes)
    dist.destroy_process_group()
    raise SystemExit(worst >= BOUND)


if __name__ == "__main__":
    main()
