"""The same step in real processes under gloo, four and eight of them; and what the others see when one of them fails."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.grid import name_of
from tests.grid_program import EIGHT, FOUR, PATIENCE
from tests.processes import run_ranks


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    files = [folder / f"{r}.json" for r in range(size)]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files]


@pytest.mark.parametrize(("name", "size", "runs"), [("four", 4, FOUR), ("eight", 8, EIGHT)], ids=["4", "8"])
def test_processes_take_the_step_of_one(name: str, size: int, runs: list[Any], tmp_path: Path) -> None:
    codes, errors = run_ranks("tests.grid_program", [name, str(tmp_path)], tmp_path, size=size, limit=240)
    assert codes == [0] * size, "\n".join(errors)
    for rank, found in enumerate(results(tmp_path, size)):
        assert len(found) >= len(runs) and set(found.values()) == {"ok"}, f"rank {rank}: {found}"
        assert {name_of(sizes) for sizes, _, _ in runs} <= found.keys()
        assert ("tree payloads" in found) == (size == 4)


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_rank_that_fails_in_a_pipeline_takes_the_others_with_it(how: str, tmp_path: Path) -> None:
    codes, errors = run_ranks("tests.grid_program", [how, str(tmp_path)], tmp_path, size=4, limit=60)
    assert codes == [1, 1, -signal.SIGKILL if how == "dies" else 1, 1], "\n".join(errors)
    assert how == "dies" or "ArithmeticError: this rank has no luck" in errors[2]
    for rank, found in enumerate(results(tmp_path, 4)):
        if rank != 2:
            said = found["saw"]
            assert said.startswith("pp_forward_backward: at ") and f"of 1f1b: rank {rank} (pp {rank}): " in said, said
            assert "over 'pp' failed; one of " in said and "rank 2 (pp 2)" in said, said
            assert found["after"] < 3 * PATIENCE + 3
