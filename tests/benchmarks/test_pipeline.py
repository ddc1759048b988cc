"""benchmarks/pipeline.py: its check runs in two real processes, and it sees gradients that are wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIDES = {
    "1f1b": "torch Schedule1F1B",
    "interleaved": "torch ScheduleInterleaved1F1B",
    "zbv": "torch ScheduleZBVZeroBubble, eager",
}


def test_check() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/pipeline.py", "--check", "--only", *SIDES]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        found = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], found
    for race, peer in SIDES.items():
        for side in ("fstep", peer):
            assert f"{race}, {side}: worst error of a gradient" in found[0][0]
    assert "WRONG" not in found[0][0]


def test_a_wrong_side_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pipeline as benchmark

    monkeypatch.setattr(benchmark, "everywhere", lambda x, op=None: x)
    want = {0: {"q": torch.tensor([3.0, 4.0])}}
    error = lambda g: benchmark.compare({0: {"q": g}} if g is not None else {}, want)  # noqa: E731
    assert error(want[0]["q"]) == 0
    assert [error(g) for g in (2 * want[0]["q"], -want[0]["q"])] == [1, 2]
    assert error(torch.full((2,), torch.nan)) == float("inf") == error(None)
    assert benchmark.compare({0: {"q": None}}, want) == float("inf")
