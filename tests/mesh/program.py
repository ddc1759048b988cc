"""What the processes of test_processes.py run: ``python -m tests.mesh.program NAME FOLDER``, under torchrun's variables.

Every rank writes what it found to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fstep
from fstep import Mesh, MeshError
from tests.mesh.cases import CASES, CHECKS, rand, value_and_transpose

PATIENCE = 4.0  # seconds after which a rank counts as gone, where ranks are late or die


def same_everywhere(mesh: Mesh) -> list[Any]:
    """Compute something that would show another order of addition; it has to have the bits that `simulate` gives."""
    both = mesh.over("pp", "tp")
    x = rand(mesh.rank).float().requires_grad_()
    y = fstep.psum(fstep.all_gather(x, axis=mesh.pp, grad="sum").exp(), axis=mesh.tp)
    z = fstep.reduce_scatter(y.bfloat16(), axis=both)
    (g,) = torch.autograd.grad(z.float().square().sum(), x)
    return [float(y.detach().double().sum()), float(z.detach().double().sum()), float(g.double().sum())]


def check_backward(mesh: Mesh) -> None:
    """Collectives from inside a backward pass, in the order that autograd chooses, on every rank."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        for axis in (mesh.tp, mesh.pp, mesh.tp):
            w = fstep.psum(fstep.pvary(w, axis=axis).sin() * (axis.rank + 1), axis=axis)
        return w.sum()

    value, grad = fstep.value_and_grad(loss)(w)
    f = lambda w: (3 * (3 * (3 * w.sin()).sin()).sin()).sum()  # noqa: E731
    want, want_grad = fstep.value_and_grad(f)(w)
    torch.testing.assert_close(value, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-14, atol=0)


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    try:
        return f(*args) or "ok"
    except Exception:
        return traceback.format_exc()


def checks() -> dict[str, Any]:
    """Everything that has to work, on two meshes of the same four processes, one after the other."""
    found: dict[str, Any] = {}
    with fstep.mesh_from_env(pp=2, tp=2, backend="gloo", timeout=60) as mesh:
        for check in [*CHECKS, check_backward]:
            found[check.__name__] = outcome(check, mesh)
        found["same bits"] = same_everywhere(mesh)
        found["drawn"] = mesh.draw()
        found["wrong device"] = outcome(lambda: fstep.psum(torch.ones(1, device="meta"), axis=mesh.tp))
    found["left"] = not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{Path(sys.argv[2]) / 'meeting'}", rank=mesh.rank, world_size=4)
    with fstep.mesh_from_env() as mesh:
        for case in CASES:
            out, gradient = value_and_transpose(case, mesh.dp)
            torch.save((out, gradient), Path(sys.argv[2]) / f"{mesh.rank} {case.name}.pt")
    found["kept"] = dist.is_initialized()
    dist.destroy_process_group()
    return found


def failures() -> dict[str, Any]:
    """Ranks that come late, call something else, send something else, and die: what do the others see, and when?

    rank = 2 dp + tp. What an axis went through leaves it broken, so each failure has an axis of its own, and the last,
    rank 3's death, is seen over both.
    """
    found: dict[str, Any] = {}

    def timed(name: str, f: Callable[[], Any]) -> None:
        start = time.monotonic()
        try:
            f()
        except MeshError as error:
            found[name] = [str(error), time.monotonic() - start]

    def write() -> None:
        (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))

    one = torch.ones(1)
    with fstep.mesh_from_env(tp=2, backend="gloo", timeout=PATIENCE) as mesh:
        everyone = mesh.over("dp", "tp")
        talk = mesh.over("dp", "ep").transport
        assert talk is not None
        if mesh.tp.rank == 0:
            timed("mismatch", lambda: fstep.psum(one * one if mesh.dp.rank else torch.ones(2), axis=mesh.dp))
            if mesh.dp.rank == 0:
                sent = talk.send(torch.ones(2), 1, channel="forward")  # its memory has to last until rank 2 has it
            else:
                timed("message", lambda: talk.recv(0, (3,), torch.float32, channel="forward").wait())
        fstep.psum(one, axis=mesh.tp)
        fstep.psum(one, axis=everyone)
        if mesh.rank == 0:
            del sent
        if mesh.rank == 1:
            time.sleep(PATIENCE + 2)
        if mesh.rank == 0:
            timed("late", lambda: fstep.psum(one, axis=mesh.tp))
        if mesh.rank == 3:
            write()
            time.sleep(0.5)
            os._exit(7)
        if mesh.rank == 2:
            timed("dead", lambda: fstep.all_gather(one, axis=mesh.tp, grad="sum"))
            timed("dead again", lambda: fstep.psum(one, axis=everyone))
        write()
        fstep.psum(one, axis=everyone)  # rank 0 and 1, and rank 2 which has had an error: all leave with one
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"checks": checks, "failures": failures}[sys.argv[1]]()
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(result))
