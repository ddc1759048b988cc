"""benchmarks/pipeline.py: its check runs in two real processes, and it sees gradients that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SIDES = {
    "1f1b": "torch Schedule1F1B",
    "interleaved": "torch ScheduleInterleaved1F1B",
    "zbv": "torch ScheduleZBVZeroBubble, eager",
}


def test_check(tmp_path: Path) -> None:
    codes, errors = run_ranks(
        "benchmarks/pipeline.py", ["--check", "--only", *SIDES], tmp_path, size=2, limit=120, CUDA_VISIBLE_DEVICES=""
    )
    text = (tmp_path / "0.out").read_text()
    assert codes == [0, 0], [text, *errors]
    for race, peer in SIDES.items():
        for side in ("fstep", peer):
            assert f"{race}, {side}: worst error of a gradient" in text
    assert "WRONG" not in text


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
