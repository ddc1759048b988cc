"""overhead.py, optimizer.py and growth.py compare equals, and would see what is wrong; draw.py draws what it is given."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fstep
from fstep.tree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def check(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    def run(script: str) -> list[str]:
        monkeypatch.setattr("sys.argv", [script, "--check"])
        load(script).main()
        return capsys.readouterr().out.splitlines()

    return run


def test_overhead(check: Any) -> None:
    assert [line.split(":")[0] for line in check("overhead")] == ["32 x 2, 48 tokens", "32 x 3, 40 tokens, with packing"]


def test_optimizer(check: Any) -> None:
    lines = check("optimizer")
    assert len(lines) == 7  # the machine; whole and cut, by told, looks and pure
    assert "worst of 144 leaves" in lines[1]  # 36 gradients, as many params, and twice as many moments
    assert all("e-1" in line or "0.0e+00" in line for line in lines[1:])


def test_growth(check: Any) -> None:
    lines = check("growth")
    assert [line.split(":")[0] for line in lines] == [
        "1 microbatches", "2 microbatches", "4 microbatches", "2 ranks", "4 ranks", "10 points run",
    ]  # fmt: skip


def wrong_finalize(change: Callable[[Any], Any]) -> Any:
    real = fstep.finalize_grads

    def finalize(*args: Any, **kwargs: Any) -> Any:
        grads, metrics = real(*args, **kwargs)
        return change(grads), metrics

    return finalize


def last_doubled(grads: Any) -> Any:
    leaves = tree_leaves(grads)
    return fstep.tree_replace_leaves(grads, [*leaves[:-1], 2 * leaves[-1]])


@pytest.mark.parametrize("change", [lambda g: tree_map(torch.neg, g), last_doubled], ids=["sign", "one leaf"])
@pytest.mark.parametrize("script", ["overhead", "optimizer"])
def test_a_wrong_gradient_is_seen(check: Any, script: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fstep, "finalize_grads", wrong_finalize(change))
    with pytest.raises(SystemExit, match="differ by"):
        check(script)


def test_a_wrong_step_is_seen(load: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fstep, "adamw", fstep.AdamW(betas=(0.9, 0.99)))  # torch is told the same
    check("optimizer")
    real = fstep.AdamW.update
    monkeypatch.setattr(fstep.AdamW, "update", lambda *a, **k: real(*a, **k | {"lr": 1.01e-4}))
    with pytest.raises(SystemExit, match="differ by"):
        check("optimizer")


def test_a_lost_microbatch_is_seen(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fstep.pp_forward_backward
    monkeypatch.setattr(fstep, "pp_forward_backward", lambda s, f, p, batch: real(s, f, p, list(batch)[:2]))
    with pytest.raises(SystemExit, match="4 microbatches differ"):
        check("growth")


def test_packed_by_hand_is_packed(load: Any) -> None:
    docs = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([4])]
    mine, ours = load("overhead").pack_by_hand(docs, "cpu"), fstep.pack_thd(fstep.make_docs(docs))
    for field in dataclasses.fields(fstep.Packed):
        a, b = getattr(mine, field.name), getattr(ours, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_what_grows_with_the_leaves(load: Any) -> None:
    start, slope = load("overhead").fitted([(10, 7.0), (20, 12.0), (40, 22.0)])
    assert (start, slope) == pytest.approx((2.0, 0.5))


def test_a_quarter_is_a_quarter(load: Any) -> None:
    """The benchmark's tree has the pieces that a rank holds, views of one buffer a layer."""
    o = load("optimizer")
    tree = o.shapes(o.SMALL, 4)
    params = o.Dense(o.SMALL).init(fstep.Key.seed(0))
    cut = fstep.simulate(lambda mesh: fstep.shard_params(params, mesh.dp), dp=4)[1]
    assert [tuple(x.shape) for x in tree_leaves(tree)] == [tuple(x.shape) for x in tree_leaves(cut)]
    made = zip(fstep.tree_paths(tree), o.values(tree, torch.float32, "cpu", 0, 1.0), strict=True)
    layer = [x for path, x in made if path.startswith("layers.1.") and x.numel()]
    assert len(layer) > 1 and len({x.untyped_storage().data_ptr() for x in layer}) == 1


def side(name: str, *seconds: float) -> dict[str, Any]:
    return {"name": name, "seconds": list(seconds), "peak": 0, "notes": {}}


def test_speedups_by_hand(load: Any) -> None:
    line = {"row": "single", "sides": [side("fstep", 1, 2, 3), side("peer", 4, 4, 3), side("other", 1, 1, 1)]}
    assert load("draw").speedups(line) == [("peer", 2.0, 1.0, 4.0), ("other", 0.5, 1 / 3, 1.0)]
    assert load("draw").speedups({"row": "peers alone", "sides": [side("a", 1), side("b", 1)]}) == []


def test_slope_is_the_exponent(load: Any) -> None:
    assert load("draw").slope([(x, 3 * x**-0.75) for x in (1, 2, 8, 64)]) == pytest.approx(-0.75)


def test_rows_alike_are_told_apart_by_their_facts(load: Any) -> None:
    lines = [{"row": "single", "shape": s, "work": 1, "machine": "m", "sides": []} for s in ("1.7b", "8b")]
    assert load("draw").labels(lines) == ["shape 1.7b", "shape 8b"]
    lines = [{"row": r, "leaves": n, "sides": []} for r, n in (("update: whole", 3), ("update: cut", 4))]
    assert load("draw").labels(lines) == ["whole", "cut"]


def test_pictures(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = load("draw")
    facts = {"machine": "1 x CPU", "series": "layers", "tokens": 1000, "about": "dim 8", "ideal": -1}
    lines: list[dict[str, Any]] = [
        {"row": f"growth: layers {x}", "x": x, **facts, "sides": [side("fstep", x / 10, x / 10)]} for x in (2, 4, 8)
    ]
    lines += [{"row": "single: a & b", "machine": "1 x CPU", "sides": [side("peer", 3.0, 3.0), side("fstep", 2.0, 2.0)]}]
    old = {**lines[-1], "sides": [side("peer", 9.0), side("fstep", 1.0)]}
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [old, *lines]))
    assert len(draw.read([file])) == 4  # of the row that was measured twice, the last

    written = []
    for name in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["draw", str(file), "--out", str(tmp_path / name)])
        draw.main()
        written.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert written[0] == written[1]
    assert list(written[0]) == ["growth-layers.svg", "single.svg"]
    for data in written[0].values():
        ET.fromstring(data)
        assert b"<dc:date>" not in data and len(data) < 20_000
    assert b"fstep: slope -1.00" in written[0]["growth-layers.svg"] and b"slope -1<" in written[0]["growth-layers.svg"]
    assert b"1.50<" in written[0]["single.svg"] and b"a &amp; b | peer" in written[0]["single.svg"]
    assert math.isclose(draw.slope([(2, 5000), (4, 2500), (8, 1250)]), -1)
