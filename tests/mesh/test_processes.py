"""The same in real processes: four ranks under gloo, started once for everything that works and once for what fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fstep
from tests.mesh.cases import CASES, CHECKS, Case, check_law
from tests.mesh.program import PATIENCE, same_everywhere
from tests.processes import run_ranks

SIZE = 4
LIMIT = 80  # seconds


def start(name: str, folder: Path) -> tuple[list[int], list[str], list[dict[str, Any]]]:
    """Start the ranks; return their exit codes, what they wrote to stderr, and what they found."""
    codes, errors = run_ranks("tests.mesh.program", [name, str(folder)], folder, size=SIZE, limit=LIMIT)
    found = [folder / f"{r}.json" for r in range(SIZE)]
    return codes, errors, [json.loads(f.read_text()) if f.exists() else {} for f in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def checked(folder: Path) -> list[dict[str, Any]]:
    codes, errors, found = start("checks", folder)
    assert codes == [0] * SIZE, "\n".join(errors)
    return found


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS] + ["check_backward"])
def test_check(name: str, checked: list[dict[str, Any]]) -> None:
    for found in checked:
        if found[name] != "ok":
            pytest.fail(found[name], pytrace=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_transpose(case: Case, checked: list[dict[str, Any]], folder: Path) -> None:
    check_law(case, [torch.load(folder / f"{r} {case.name}.pt") for r in range(SIZE)])


def test_same_bits_as_in_threads(checked: list[dict[str, Any]]) -> None:
    assert [found["same bits"] for found in checked] == fstep.simulate(same_everywhere, pp=2, tp=2)


def test_mesh(checked: list[dict[str, Any]]) -> None:
    assert [found["drawn"] for found in checked] == fstep.simulate(lambda mesh: mesh.draw(), pp=2, tp=2)


def test_groups_are_left_as_they_were_found(checked: list[dict[str, Any]]) -> None:
    assert all(found["left"] is True and found["kept"] is True for found in checked)


def test_refuses_a_device_that_the_backend_cannot_move(checked: list[dict[str, Any]]) -> None:
    message = "psum: x is on meta, and axis 'tp' talks through gloo; move x, or start the mesh with the other backend"
    assert all(message in found["wrong device"] for found in checked)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], list[str], list[dict[str, Any]], float]:
    began = time.monotonic()
    return *start("failures", tmp_path_factory.mktemp("failures")), time.monotonic() - began


def test_nobody_hangs(failed: tuple[list[int], list[str], list[dict[str, Any]], float]) -> None:
    codes, errors, _, took = failed
    assert codes == [1, 1, 1, 7], "\n".join(errors)
    assert took < 40
    for rank in (0, 1, 2):
        last = errors[rank].strip().splitlines()[-1]
        assert (
            f"fstep.mesh.transport.MeshError: rank {rank} (dp {rank // 2}, tp {rank % 2}): psum over 'dp+tp' failed" in last
        )


GONE = "has died or raised, or did not come within 4 seconds"
FAILURES = [
    ("late", 0, f"rank 0 (dp 0, tp 0): psum over 'tp' failed; one of rank 1 (dp 0, tp 1) {GONE}", PATIENCE),
    ("dead", 2, f"rank 2 (dp 1, tp 0): all_gather over 'tp' failed; one of rank 3 (dp 1, tp 1) {GONE}", 1),
    (
        "dead again",
        2,
        "rank 2 (dp 1, tp 0): psum over 'dp+tp' failed; one of rank 0 (dp 0, tp 0), rank 1 (dp 0, tp 1), "
        f"rank 3 (dp 1, tp 1) {GONE}",
        PATIENCE,
    ),
    (
        "mismatch",
        0,
        "axis 'dp': rank 0 (dp 0, tp 0) calls psum of float32 [2] and rank 2 (dp 1, tp 0) calls psum of float32 [1];",
        1,
    ),
    (
        "mismatch",
        2,
        "axis 'dp': rank 2 (dp 1, tp 0) calls psum of float32 [1] and rank 0 (dp 0, tp 0) calls psum of float32 [2];",
        1,
    ),
    (
        "message",
        2,
        "recv over 'dp' (channel 'forward'): rank 2 (dp 1, tp 0) expects float32 [3] and rank 0 (dp 0, tp 0) sent "
        "float32 [2]",
        1,
    ),
]


@pytest.mark.parametrize(("name", "rank", "begins", "seconds"), FAILURES)
def test_failure(
    name: str, rank: int, begins: str, seconds: float, failed: tuple[list[int], list[str], list[dict[str, Any]], float]
) -> None:
    text, took = failed[2][rank][name]
    assert text.startswith(begins), text
    assert took < seconds + 3
