"""fstep beside others' code: benchmarks/peers.py in two real processes, started once, and the bounds of its table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.processes import run_ranks

LIMIT = 150  # seconds; it takes a fifth of that
BOUND = 1e-10

PIPELINES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
STEPS = ("step 0", "step 1", "step 2", "weights after 3 steps of AdamW")
METHODS = ("ring", "allgather", "ulysses")
# Every comparison that has to be there, and how many leaves are in it: 4 layers of 9 and 3 more, or 2 layers of 9 and 3.
ROWS: dict[tuple[str, str, str], int] = {
    ("pipeline, 2 ranks", f"Schedule{name}", how): 39
    for name in PIPELINES
    for how in ("our Dense", "the same module in both")
}
ROWS[("pipeline, 2 ranks, uneven", "one process", "our Dense")] = 39
for how in ("gathered layer by layer", "gathered once a step"):
    # The gradients' norm is a leaf more.
    ROWS |= {("sharded parameters, 2 ranks", "FSDP2", f"{step}, {how}"): 22 - (step == STEPS[-1]) for step in STEPS}
for peer in ("torch ring, adding in float64", "SDPA of one process"):
    ROWS |= {("context, 2 ranks", peer, f'cp_attention, method="{method}"'): 4 for method in METHODS}
ROWS[("tensor, 2 ranks", "tensor.parallel", "our Dense")] = 21


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("peers")
    arguments = ["--json", str(folder / "rows.json")]
    _, errors = run_ranks("benchmarks/peers.py", arguments, folder, size=2, limit=LIMIT, CUDA_VISIBLE_DEVICES="")
    if not (folder / "rows.json").exists():
        pytest.fail("\n".join([*((folder / f"{r}.out").read_text() for r in range(2)), *errors]), pytrace=False)
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows


@pytest.mark.parametrize("key", ROWS, ids=", ".join)
def test_equals_the_peer(key: tuple[str, str, str], table: list[dict[str, Any]]) -> None:
    (row,) = [row for row in table if (row["part"], row["peer"], row["note"]) == key]
    assert row["leaves"] == ROWS[key]
    assert row["loss"] < BOUND, f"the loss is off by {row['loss']:.1e}"
    assert row["error"] < BOUND, f"{row['leaf']} is off by {row['error']:.1e}"


def test_no_other_row_claims_to_be_equal(table: list[dict[str, Any]]) -> None:
    rest = [row for row in table if (row["part"], row["peer"], row["note"]) not in ROWS]
    assert all(not row["leaf"] or not row["equal"] for row in rest), rest


def test_relative_error_of_wrong_gradients() -> None:
    from benchmarks.peers_model import relative

    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative(g, g) == 0
    assert [relative(2 * g, g), relative(-g, g), relative(g / 2, g)] == [1, 2, 0.5]
    assert relative(torch.full_like(g, torch.nan), g) == float("inf")
    assert relative(g, 0 * g) > 1e100
    with pytest.raises(SystemExit, match="shapes"):
        relative(g[:1], g)
