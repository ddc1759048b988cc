"""benchmarks/attention.py: its check runs, and would see a kernel that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_check() -> None:
    command = [sys.executable, "benchmarks/attention.py", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 14  # 4 rows by 3 methods, and a batch of two of them


def test_errors_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention as benchmark

    row = benchmark.Row("two", (3, 5), 2, 1)
    assert row.flop == 2 * (3 * 4 + 5 * 6) * 2 * 128  # two products of n (n + 1) / 2 pairs, a multiplication and an addition
    assert sum(benchmark.zipf(100, 20)) == 100

    def scaled(row: benchmark.Row, cu: torch.Tensor) -> benchmark.Attend:
        return lambda q, k, v: benchmark.plain(row, cu)(1.5 * q, k, v)

    def joined(row: benchmark.Row, cu: torch.Tensor) -> benchmark.Attend:
        return benchmark.plain(benchmark.Row("one", (8,), 2, 1), cu)

    assert max(benchmark.against_plain(row, benchmark.plain, "cpu", torch.float64, 8)) == 0
    for wrong in (scaled, joined):
        assert min(benchmark.against_plain(row, wrong, "cpu", torch.float64, 8)) > 0.01
