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
