"""What the processes of test_grid_processes.py run: ``python -m tests.grid_program NAME FOLDER``.

Every rank writes what it found to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fstep
from fstep import MeshError
from tests.grid import CASES, check_rank, name_of, step

PATIENCE = 5.0  # seconds after which a rank counts as gone
FOUR: list[tuple[dict[str, int], str, dict[str, Any]]] = [
    ({"pp": 4}, "tied", {"schedule": "1f1b"}),
    ({"pp": 2, "cp": 2}, "ragged", {"schedule": "zbv"}),
    ({"dp": 2, "pp": 2}, "tied", {"schedule": "interleaved_zero_bubble", "zero": True}),
    ({"cp": 2, "tp": 2}, "masked", {}),
    ({"dp": 4}, "few", {"zero": True}),
]
EIGHT: list[tuple[dict[str, int], str, dict[str, Any]]] = [
    ({"dp": 2, "pp": 2, "tp": 2}, "tied", {"schedule": "1f1b", "zero": True}),
    ({"pp": 4, "cp": 2}, "few", {"schedule": "interleaved"}),
]


def tree_payloads() -> str:
    """A pipeline whose stages pass on a tree of several tensors, one of which wants no gradient."""

    def stage(params: Any, x: Any, mb: Any) -> Any:
        x = {"h": mb, "both": (mb * 2, mb.sum(-1)), "n": torch.tensor(0), "empty": mb[:0]} if x is None else x
        h = torch.tanh(x["h"] * params["w"]) + x["both"][0]
        return {**x, "h": h, "both": (x["both"][0] * params["w"], x["both"][1] + h.sum(-1)), "n": x["n"] + 1}

    def loss(params: Any, x: Any, mb: Any) -> fstep.Ratio:
        return fstep.Ratio(x["h"].sum() + (x["both"][1] ** 2).sum() * x["n"], torch.tensor(1.0, dtype=torch.float64))

    key = fstep.Key.seed(4)
    weights = [key.fold_in(i).normal((3,), dtype=torch.float64) for i in range(4)]
    batch = [key.fold_in(9 + i).normal((n, 3), dtype=torch.float64) for i, n in enumerate((2, 50, 1, 7, 0, 3))]

    def whole(params: Any, x: Any, mb: Any) -> Any:
        for w in params:
            x = stage({"w": w}, x, mb)
        return x

    value, grads = fstep.pp_forward_backward(whole, loss, weights, batch)
    with fstep.mesh_from_env(pp=4) as mesh:
        got = fstep.pp_forward_backward(stage, loss, {"w": weights[mesh.pp.rank]}, batch, axis=mesh.pp)
        scores = fstep.pp_forward(stage, lambda p, x, mb: x, {"w": weights[mesh.pp.rank]}, batch, axis=mesh.pp)
        same = torch.equal(got[0].num, value.num) and torch.equal(got[1]["w"], grads[mesh.pp.rank])
        alone = fstep.pp_forward(whole, lambda p, x, mb: x, weights, batch)
        for a, b in zip(fstep.tree_leaves(list(scores)), fstep.tree_leaves(list(alone)), strict=True):
            same = same and torch.equal(a, b)
    return "ok" if same else "different"


def compare(runs: list[tuple[dict[str, int], str, dict[str, Any]]]) -> dict[str, str]:
    """Take a step on several meshes of the same processes, one after the other."""
    found = {}
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    for sizes, kind, how in runs:
        with fstep.mesh_from_env(**sizes) as mesh:
            try:
                check_rank(mesh.rank, step(mesh, CASES[kind], **how), CASES[kind])
                found[name_of(sizes)] = "ok"
            except AssertionError:
                found[name_of(sizes)] = traceback.format_exc()
    if dist.get_world_size() == 4:
        found["tree payloads"] = tree_payloads()
    dist.destroy_process_group()
    return found


def fail(how: str) -> dict[str, Any]:
    """Rank 2 raises or dies in the middle of a pipeline: what do the others see, and when?"""
    with fstep.mesh_from_env(pp=4, backend="gloo", timeout=PATIENCE) as mesh:
        fstep.psum(torch.ones(1), axis=mesh.pp)

        def stage(params: Any, x: Any, mb: Any) -> Any:
            if mesh.rank == 2 and int(mb) == 3:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("this rank has no luck")
            return (torch.ones(3) if x is None else x) * params["w"]

        def loss(params: Any, x: Any, mb: Any) -> fstep.Ratio:
            return fstep.Ratio(x.sum(), torch.tensor(1.0))

        began = time.monotonic()
        try:
            fstep.pp_forward_backward(stage, loss, {"w": torch.ones(3)}, [torch.tensor(i) for i in range(8)], axis=mesh.pp)
        except MeshError as error:
            write({"saw": str(error), "after": time.monotonic() - began})
            raise
    return {}


def write(found: dict[str, Any]) -> None:
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    name = sys.argv[1]
    write(compare({"four": FOUR, "eight": EIGHT}[name]) if name in ("four", "eight") else fail(name))
