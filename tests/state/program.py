"""What the processes of test_save_in_processes.py run, under torchrun's variables: a folder, and the rank that dies.

Two ranks save, with tp 2: once well, once with rank 1 out of disk space, once with one of them killed while it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fstep
from fstep import CheckpointError, Mesh, MeshError, Shard
from fstep.state import files

PATIENCE = 4.0  # seconds after which a rank counts as gone
WHOLE = torch.arange(4000.0).reshape(400, 10)
SPEC = {"x": fstep.HFTensor("x", (400, 10)), "step": fstep.HFTensor("step", ())}


def state(mesh: Mesh, step: int) -> dict[str, Any]:
    return {"x": Shard.cut(WHOLE + step, axis=mesh.tp, dim=1), "step": torch.tensor(step)}


def main(folder: Path, victim: int) -> None:
    found: dict[str, Any] = {}
    write = files.write_safetensors

    def timed(name: str, error: type[Exception], f: Any) -> None:
        start = time.monotonic()
        try:
            f()
        except error as caught:
            found[name] = [str(caught), time.monotonic() - start]

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    def die(path: Path, *args: Any) -> Any:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    with fstep.mesh_from_env(tp=2, backend="gloo", timeout=PATIENCE) as mesh:
        timed("no mesh", CheckpointError, lambda: fstep.save_checkpoint(folder / "run", state(mesh, 1), step=1))
        timed("no mesh, model", fstep.WeightsError, lambda: fstep.save_hf(folder / "model", state(mesh, 1), SPEC))
        fstep.save_checkpoint(folder / "run", state(mesh, 1), mesh=mesh, step=1)
        again = fstep.load_checkpoint(folder / "run", state(mesh, 0), mesh=mesh)
        found["same"] = bool(torch.equal(again["x"].value, state(mesh, 1)["x"].value) and again["step"] == 1)
        fstep.save_hf(folder / "model", state(mesh, 1), SPEC, mesh=mesh)
        streamed = dict(fstep.stream_hf(state(mesh, 1), SPEC, mesh=mesh))
        found["streamed"] = bool(torch.equal(streamed["x"], WHOLE + 1) and streamed["step"] == 1)
        if mesh.rank == 1:
            files.write_safetensors = full
        timed(
            "full", CheckpointError, lambda: fstep.save_checkpoint(folder / "run", state(mesh, 2), mesh=mesh, step=2, keep=1)
        )
        found["after full"] = sorted(os.listdir(folder / "run"))
        files.write_safetensors = die if mesh.rank == victim else write
        timed("dead", MeshError, lambda: fstep.save_checkpoint(folder / "run", state(mesh, 2), mesh=mesh, step=2, keep=1))
        (folder / f"{mesh.rank}.json").write_text(json.dumps(found))
        os._exit(0)  # the mesh is broken


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
