"""benchmarks/single.py and packing.py compare equals: their own check, and that it sees what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "sides"),
    [("single", {"kernels", "dense", "hf"}), ("packing", {"padded", "packed", "round", "fixed", "same"})],
)
def test_all_sides_do_the_same(script: str, sides: set[str]) -> None:
    """Losses, norms and every gradient of each side, beside fstep's, over several steps."""
    text = run(f"benchmarks/{script}.py", "--check")
    compared = {side for side in sides if re.search(rf"{side}, step 1.* is off by [0-9.]+e-0\d", text)}
    assert compared == sides, text
    assert text.rstrip().endswith("equal"), text


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import job

    return job


def test_a_wrong_gradient_is_seen(job: Any) -> None:
    right = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    assert job.worst_gradient(right, right) == (0.0, "b")
    for wrong, error in ((2 * right["a"], 1.0), (-right["a"], 2.0), (right["a"].flip(0), 2**0.5 / 5), (0 * right["a"], 1.0)):
        found, whose = job.worst_gradient(right | {"a": wrong}, right)
        assert whose == "a" and found == pytest.approx(error)
    assert job.worst_gradient(right | {"b": torch.full((2,), torch.nan)}, right)[0] == float("inf")
    assert job.worst_gradient({"a": right["a"]}, right)[0] == float("inf")


def test_operations_are_counted_by_hand(job: Any) -> None:
    # One layer of dim 8 with 2 heads and 1 key head of 4, ffn 16, vocab 10; documents of 3 and 2 tokens.
    config = job.llama(8, 16, 2, 1, vocab=10, kv_heads=1)
    matrices = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 8 * 10  # q; k, v; o; gate, up, down; head
    products = 3 * 2 * 5 * matrices  # forward and twice backward, a multiplication and an addition each
    attention = 3 * 2 * 2 * (3 * 3 + 2 * 2) / 2 * 2 * 4  # scores and values, half of each square, 2 heads of 4
    assert job.flops(config, [3, 2]) == products + attention


def test_weights_reach_a_module_under_its_own_names(job: Any) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 1))
    names = job.Names({"q": p}, {"q": lambda w: w.flip(0)}, {"q": lambda w: w.flip(0)})
    names.load({"q": torch.arange(4.0)[:, None]})
    assert p.flatten().tolist() == [3, 2, 1, 0]
    p.grad = p.detach().clone()
    assert names.grads()["q"].flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"differ: \['k', 'q'\]"):
        names.load({"k": torch.zeros(1)})


def test_pairs_are_interleaved_and_back(job: Any) -> None:
    from peers_modules import deinterleave, interleave

    w = torch.arange(12.0)[:, None]  # two heads of 6 rows: pairs (0, 3), (1, 4), (2, 5) and (6, 9), ...
    assert interleave(w, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert deinterleave(interleave(w, 2), 2).equal(w)


def test_a_side_that_fails_takes_no_other_with_it(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from sides import Guarded, pick

    def broken_later() -> Any:
        raise RuntimeError("no kernel")

    guard = Guarded(compared=1)
    one = torch.tensor(1.0)
    good = guard.side("good", lambda: (lambda: (one, 2 * one), None))()
    off = guard.side("off", lambda: (lambda: (1.5 * one, 1.5 * one), None))()
    never, later = guard.side("never", lambda: 1 / 0)(), guard.side("later", lambda: (broken_later, None))()  # type: ignore
    for step in (good, off, never, later) * 2:
        step()
    assert guard.failed.keys() == {"never", "later"}
    assert "ZeroDivisionError" in guard.failed["never"] and "no kernel" in guard.failed["later"]
    assert guard.errors("off", "good") == {"loss off by": "5.0e-01", "norm off by": "2.5e-01"}
    assert len(guard.seen["good"]) == 1
    assert pick("a,b", ("a",), ("a", "b"), {"b": "no_such_package"}) == ["a"]
    assert "left out: b, as no_such_package is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="c not among a, b"):
        pick("c", ("a",), ("a", "b"), {})


def test_rows_for_transformers_say_where_documents_are(job: Any) -> None:
    from peers_packing import by_us, in_order, padded

    docs = [torch.arange(1, 1 + n) for n in (5, 3, 4, 2)]
    (batch,) = padded(docs)
    assert batch["input_ids"].shape == (4, 8) and batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 2]
    assert (batch["labels"] != -100).sum(1).tolist() == [5, 3, 4, 2]

    first, second = in_order(docs, 10)
    assert first["cu_seq_lens_q"].tolist() == [0, 5, 8, 10] and second["cu_seq_lens_q"].tolist() == [0, 4, 6, 10]
    assert first["labels"][0].tolist() == [-100, 2, 3, 4, 5, -100, 2, 3, -100, -100]
    assert second["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert (first["max_length_q"], second["max_length_q"]) == (5, 4)

    rows = by_us(docs, 8)
    assert sorted(n for row in rows for n in row["cu_seq_lens_q"].diff().tolist()) == [2, 3, 4, 5]
    assert [row["input_ids"].shape[1] for row in rows] == [7, 7]


def test_the_list_of_documents_is_the_same_every_time(job: Any) -> None:
    from packing import lengths

    sizes = lengths(4000, 4096)
    assert sizes == lengths(4000, 4096) and min(sizes) == 32 and max(sizes) == 4096
    assert sum(sizes) / 4000 == pytest.approx(740, abs=1)


def test_rows_of_zipf_lengths_are_full(job: Any) -> None:
    """Of the places that fstep computes on 0.98 are tokens; without padding, all of them."""
    from packing import lengths, our_rows

    docs = [torch.zeros(n, dtype=torch.int64) for n in lengths(256, 4096)]
    total = sum(map(len, docs))
    for side, least in (("fstep", 1.0), ("round", 0.97), ("fixed", 0.95)):
        rows = our_rows(docs, 8192, side)
        assert total / sum(len(row.tokens) for row in rows) >= least, side
        sizes = {len(row.tokens) for row in rows}
        assert max(sizes) <= 8192
        assert side == "fstep" or sizes == {8192} or (side == "round" and all(n % 256 == 0 for n in sizes))
