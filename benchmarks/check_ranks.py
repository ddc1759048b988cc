"""Does a step on ranks equal the step on one? Prints the error of every gradient leaf, in float64.

    torchrun --nproc-per-node 4 benchmarks/check_ranks.py          NCCL where each process has a GPU, else gloo
    python benchmarks/check_ranks.py --simulate 4                  the same ranks as threads of one process

Every rank computes the whole step alone as well, from the same documents, and compares.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fstep
from fstep_models.dense import Config, Dense

CONFIG = Config(
    family="qwen3", vocab=211, dim=64, ffn=96, layers=3, heads=4, kv_heads=2, head_dim=16,
    rope=fstep.Rope(theta=10000.0, dim=16), windows=(0, 9, 0), tied=True, qk_norm=True,
)  # fmt: skip
LENGTHS = [70, 3, 41, 1, 18, 96, 33, 2, 57, 12, 12, 5]


def step(mesh: fstep.Mesh, device: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return new params, gradients and metrics of one step over uneven documents, one of them masked."""
    key = fstep.Key.seed(0)
    tokens = [(key.fold_in(i).uniform((n,)) * CONFIG.vocab).long() for i, n in enumerate(LENGTHS)]
    weights = [key.fold_in(-i - 1).uniform((n,), dtype=torch.float64) * (i != 5) for i, n in enumerate(LENGTHS)]
    docs = fstep.divide_documents(fstep.make_docs(tokens, weights=weights), axis=mesh.dp)
    model = Dense(CONFIG)
    params = model.init(key, dtype=torch.float64, device=device)
    batch = [fstep.to_device(fstep.pack_thd(mb), device) for mb in fstep.split_microbatches(docs, max_tokens=100)]

    def loss_fn(params: Any, x: torch.Tensor, mb: fstep.Packed) -> fstep.Ratio:
        return fstep.sft_loss(model.logprobs(params, x, mb), mb.weights)

    loss, grads = fstep.pp_forward_backward(model.stage(), loss_fn, params, batch)
    grads, metrics = fstep.finalize_grads(grads, loss, mesh=mesh, max_norm=0.1)
    return fstep.sgd.update(fstep.init_state(params, fstep.sgd), grads, lr=0.1).params, grads, metrics


def compare(mesh: fstep.Mesh, device: str) -> list[tuple[str, float]]:
    """Return the relative error of the metrics, of every gradient leaf and of the new params, the worst of all ranks."""
    ours, alone = step(mesh, device), step(fstep.Mesh(), device)
    rows = []
    for name, a, b in zip(("params", "grads", "metrics"), ours, alone, strict=True):
        for path, x, y in zip(fstep.tree_paths(b), fstep.tree_leaves(a), fstep.tree_leaves(b), strict=True):
            error = (x - y).double().norm() / y.double().norm().clamp(min=1e-300)
            rows.append((f"{name}.{path}", float(fstep.pmax(error, axis=mesh.dp))))
    return rows


def main() -> None:
    """Compare, and print the table on the first rank."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--simulate", type=int, default=0, help="threads as ranks, this many")
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.simulate:
        rows, ranks = fstep.simulate(lambda mesh: compare(mesh, device), dp=a.simulate)[0], a.simulate
    else:
        with fstep.mesh_from_env() as mesh:
            rows, ranks = compare(mesh, device), mesh.size if mesh.rank == 0 else 0
    if ranks:
        print(f"| leaf | relative error, {ranks} ranks on {device} |\n|---|---|")
        print("\n".join(f"| {path} | {error:.1e} |" for path, error in rows))
        worst = max(error for _, error in rows)
        print(f"\nworst {worst:.1e}: {'equal' if worst < 1e-10 else 'DIFFERENT'}")
        raise SystemExit(worst >= 1e-10)


if __name__ == "__main__":
    main()
