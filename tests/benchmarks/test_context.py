"""benchmarks/context.py: its check runs in two real processes, and it sees a side that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fstep
from tests.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_check(tmp_path: Path) -> None:
    codes, errors = run_ranks("benchmarks/context.py", ["--check"], tmp_path, size=2, limit=120, CUDA_VISIBLE_DEVICES="")
    text = (tmp_path / "0.out").read_text()
    assert codes == [0, 0], [text, *errors]
    assert text.rstrip().endswith("equal"), text
    compared = re.findall(r"^(one document|packed) +(.+?) +out, dq", text, re.MULTILINE)
    ours = {(row, f"fstep, {m}") for row in ("one document", "packed") for m in ("auto", "allgather", "ulysses", "ring")}
    assert set(compared) >= {*ours, ("one document", "all-gather by hand")}


def test_a_wrong_side_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import context as benchmark

    def wrong(change: Any) -> Any:
        def side(row: Any) -> Any:
            right = benchmark.ours("ring", row)
            return benchmark.Side(lambda q, k, v: right.attend(*change(q, k, v)))

        return side

    def joined(row: Any) -> Any:
        whole = benchmark.Row("joined", (row.tokens,), row.mesh, row.device)
        return benchmark.ours("ring", whole)

    changes = {
        "scaled": wrong(lambda q, k, v: (1.5 * q, k, v)),
        "rolled": wrong(lambda q, k, v: (q, k.roll(1, 0), v.roll(1, 0))),
        "joined": joined,
        "right": wrong(lambda q, k, v: (q, k, v)),
    }
    monkeypatch.setattr(benchmark, "SIDES", changes)

    def on_rank(mesh: fstep.Mesh) -> dict[str, list[float]]:
        row = benchmark.Row("two", (16, 8), mesh, "cpu")
        found: dict[str, list[float]] = benchmark.errors(row, list(changes), torch.float64, benchmark.SMALL)
        return found

    for found in fstep.simulate(on_rank, cp=2):
        assert max(found.pop("right")) < 1e-12
        assert min(map(min, found.values())) > benchmark.BOUND


def test_operations_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import context as benchmark

    pairs = 3 * 4 / 2 + 5 * 6 / 2  # that see each other; two products of 128 forward, five backward, for 32 heads
    assert benchmark.flop([3, 5]) == 7 * 2 * pairs * 32 * 128
    assert sum(benchmark.PACKED) == 128 and all(n * 1024 % 8 == 0 for n in benchmark.PACKED)
