"""The mesh does not change the answer: every gradient leaf, loss, weight and norm, on every mesh up to eight ranks.

`make test` runs every mesh with every schedule, and every mesh with every kind of batch; `pytest -m slow tests/test_grid.py`
runs every mesh with every schedule on every kind of batch.
"""

from __future__ import annotations

import pytest

from tests.grid import CASES, MESHES, SCHEDULES, compare, name_of

PIPELINES = [m for m in MESHES if m["pp"] > 1]
OTHERS = [m for m in MESHES if m["pp"] == 1]


def runs(mesh: dict[str, int], schedule: str, kind: str) -> bool:
    return schedule != "dualpipev" or CASES[kind].microbatches >= 2 * mesh["pp"]


def rotated() -> list[tuple[dict[str, int], str, str]]:
    """Pair schedules with kinds of batches so that each mesh meets all of both."""
    out = []
    kinds = list(CASES)
    for i, mesh in enumerate(PIPELINES):
        for j, schedule in enumerate(SCHEDULES):
            kind = kinds[(i + j) % len(kinds)]
            out.append((mesh, schedule, kind if runs(mesh, schedule, kind) else "ragged"))
    return out


@pytest.mark.parametrize(("mesh", "schedule", "kind"), rotated(), ids=lambda x: name_of(x) if isinstance(x, dict) else x)
def test_pipelines(mesh: dict[str, int], schedule: str, kind: str) -> None:
    compare(mesh, CASES[kind], schedule=schedule)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mesh", OTHERS, ids=name_of)
def test_without_a_pipeline(mesh: dict[str, int], kind: str) -> None:
    compare(mesh, CASES[kind], context="allgather" if kind in ("masked", "few") else "ring")


@pytest.mark.parametrize("mesh", [m for m in MESHES if m["dp"] * m["cp"] > 1], ids=name_of)
def test_sharded_parameters(mesh: dict[str, int]) -> None:
    kinds = list(CASES)
    kind = kinds[MESHES.index(mesh) % len(kinds)]
    compare(mesh, CASES[kind], zero=True, schedule="zbv" if mesh["pp"] == 2 else "1f1b")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", PIPELINES, ids=name_of)
def test_the_whole_grid(mesh: dict[str, int], schedule: str, kind: str) -> None:
    if not runs(mesh, schedule, kind):
        pytest.skip("dualpipev needs two microbatches a rank")
    compare(mesh, CASES[kind], schedule=schedule)
