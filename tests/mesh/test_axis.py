"""`Axis` and `Mesh` as values: what they refuse, how they count, how they are drawn."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fstep
from fstep import Axis, Mesh
from fstep.mesh.launch import derive_sizes


def test_axis_refuses() -> None:
    with pytest.raises(ValueError, match="Axis: size of 'dp' is 0; pass 1 or more"):
        Axis("dp", 0)
    with pytest.raises(ValueError, match=r"Axis: rank 2 of 'dp' is outside 0\.\.1"):
        Axis("dp", 2, 2)
    with pytest.raises(ValueError, match=r"Axis: ranks of 'dp' are \(3, 3\); pass 2 different ones"):
        Axis("dp", 2, 0, (3, 3))
    with pytest.raises(ValueError, match=r"Axis: ranks of 'dp' are \(3,\); pass 2 different ones"):
        Axis("dp", 2, 0, (3,))


def test_axis_is_a_value() -> None:
    assert Axis("dp", 2, 1).ranks == (0, 1)
    assert Axis("dp", 2, 1) == Axis("dp", 2, 1, (0, 1)) and hash(Axis("dp", 2, 1)) == hash(Axis("dp", 2, 1, (0, 1)))
    with pytest.raises(AttributeError):
        Axis("dp").size = 2


def test_mesh_refuses_an_axis_of_another_name() -> None:
    with pytest.raises(ValueError, match="Mesh: dp is an axis named 'cp'; pass cp= or name it 'dp'"):
        Mesh(dp=Axis("cp"))


def test_over_on_one_process() -> None:
    axis = Mesh().over("dp", "cp")
    assert axis == Axis("dp+cp") and fstep.psum(torch.ones(1), axis=axis).item() == 1.0
    for bad in ((), ("dp", "dp"), ("dp", "xp")):
        with pytest.raises(ValueError, match=r"Mesh.over: .* pass some of pp, dp, ep, cp, tp"):
            Mesh().over(*bad)


def test_over_keeps_the_transport_of_the_one_axis_that_is_wide() -> None:
    assert all(fstep.simulate(lambda mesh: mesh.over("cp", "dp").transport is mesh.dp.transport, dp=2))


def test_draw() -> None:
    assert Mesh().draw() == "1 rank"
    assert fstep.simulate(lambda mesh: mesh.draw(), dp=3)[1] == "dp 3 = 3 ranks\ndp 0  dp 1  dp 2\n   0   [1]     2"
    assert fstep.simulate(lambda mesh: mesh.draw(), pp=2, dp=2, tp=3)[11].splitlines() == [
        "pp 2 x dp 2 x tp 3 = 12 ranks",
        "            tp 0  tp 1  tp 2",
        "pp 0  dp 0     0     1     2",
        "      dp 1     3     4     5",
        "pp 1  dp 0     6     7     8",
        "      dp 1     9    10  [11]",
    ]


def test_dp_is_derived() -> None:
    assert derive_sizes(8, dp=None, pp=2, cp=1, tp=2, ep=1) == {"pp": 2, "dp": 2, "ep": 1, "cp": 1, "tp": 2}
    assert derive_sizes(4, dp=2, pp=1, cp=2, tp=1, ep=1)["dp"] == 2
    assert list(derive_sizes(1, dp=None, pp=1, cp=1, tp=1, ep=1)) == ["pp", "dp", "ep", "cp", "tp"]


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError) as info:
        derive_sizes(4, dp=None, pp=3, cp=2, tp=1, ep=1)
    assert str(info.value) == (
        "mesh_from_env: pp 3 * cp 2 = 6 does not divide 4 processes; start a multiple of 6, as with torchrun "
        "--nproc-per-node 6"
    )
    with pytest.raises(ValueError) as info:
        derive_sizes(4, dp=3, pp=1, cp=1, tp=2, ep=1)
    assert str(info.value) == (
        "mesh_from_env: dp 3 * tp 2 = 6, and there are 4 processes; leave dp out, or start 6, as with torchrun "
        "--nproc-per-node 6"
    )
    with pytest.raises(ValueError, match="mesh_from_env: cp is 0; pass a number of ranks, 1 or more"):
        derive_sizes(4, dp=None, pp=1, cp=0, tp=1, ep=1)


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with fstep.mesh_from_env() as mesh:
        assert mesh == Mesh() and not torch.distributed.is_initialized()
    message = "pp 2 = 2 does not divide 1 process; start a multiple of 2, as with torchrun --nproc-per-node 2"
    with pytest.raises(ValueError, match=message), fstep.mesh_from_env(pp=2):
        pass
    with pytest.raises(ValueError, match="backend is 'mpi'"), fstep.mesh_from_env(backend="mpi"):
        pass


def test_importing_fstep_starts_nothing_distributed() -> None:
    code = """
import sys, torch, optree, safetensors
before = {m for m in sys.modules if m.startswith("torch.distributed")}
import fstep
fstep.simulate(lambda mesh: fstep.psum(torch.ones(1), axis=mesh.dp), dp=2)
more = {m for m in sys.modules if m.startswith("torch.distributed")} - before
assert not more, f"importing fstep imports {len(more)} modules of torch.distributed, {min(more)} the first"
assert not torch.distributed.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
