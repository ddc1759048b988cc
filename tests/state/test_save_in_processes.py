"""Saves of real processes: two ranks under gloo, of which one fails and then dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fstep
from tests.processes import run_ranks
from tests.state.program import SPEC, WHOLE

LIMIT = 60  # seconds


@pytest.fixture(scope="module", params=[1, 0], ids=["rank 1 dies", "rank 0 dies"])
def victim(request: pytest.FixtureRequest) -> int:
    rank: int = request.param
    return rank


@pytest.fixture(scope="module")
def folder(victim: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start both ranks as torchrun would, and wait for them."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = run_ranks("tests.state.program", [str(folder), str(victim)], folder, size=2, limit=LIMIT)
    assert codes == [-signal.SIGKILL if r == victim else 0 for r in (0, 1)], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, victim: int) -> dict[str, Any]:
    """Return what the other rank saw."""
    read: dict[str, Any] = json.loads((folder / f"{1 - victim}.json").read_text())
    return read


def test_saved_and_loaded_by_parts(found: dict[str, Any]) -> None:
    assert found["same"] and found["streamed"]


def test_a_mesh_that_was_forgotten(found: dict[str, Any]) -> None:
    for name, function in (("no mesh", "save_checkpoint"), ("no mesh, model", "save_hf")):
        assert found[name][0].startswith(
            f"{function}: mesh is not given, and the program runs on 2 ranks; call it on all of"
        )


def test_model_files_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    one = fstep.save_hf(tmp_path / "model", {"x": WHOLE + 1, "step": torch.tensor(1)}, SPEC)
    assert os.listdir(folder / "model") == os.listdir(one) == ["model.safetensors"]
    assert (folder / "model" / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_every_rank_has_the_error_at_once(found: dict[str, Any], victim: int) -> None:
    message, seconds = found["full"]
    assert message == "save_checkpoint: OSError: [Errno 28] No space left on device (on rank 1)"
    assert seconds < 2
    if victim == 1:  # seen by rank 0, which tidies up after it has told the others
        assert found["after full"] == ["step-00000001"]


def test_a_rank_killed_while_it_writes(found: dict[str, Any], folder: Path, victim: int) -> None:
    message, seconds = found["dead"]
    us, them = f"rank {1 - victim} (tp {1 - victim})", f"rank {victim} (tp {victim})"
    assert message.startswith(
        (f"{us}: recv (channel 'forward') from {them} over", f"{us}: send (channel 'forward') to {them}")
    )
    assert "failed" in message and seconds < 6
    # Rank 0 tidies up; dead, it leaves what the next save removes.
    assert sorted(os.listdir(folder / "run")) == [".tmp-new-step-00000002"] * (victim == 0) + ["step-00000001"]
    like = {"x": WHOLE, "step": torch.tensor(0)}
    again = fstep.load_checkpoint(folder / "run", like)
    assert torch.equal(again["x"], WHOLE + 1) and again["step"] == 1
    fstep.save_checkpoint(folder / "run", like, step=3)
    assert sorted(os.listdir(folder / "run")) == ["step-00000001", "step-00000003"]
