"""The example of distillation: the student comes nearer to its teacher than labels bring it, on every mesh the same."""

import argparse
import re
import sys
from pathlib import Path

import pytest

import fstep
from tests.examples.test_dpo import example, refused, rows, same, start, trained

FEW = argparse.Namespace(teacher_steps=1, steps=2, sentences=8, lr=5e-3, divergence="forward", top_k=0)
KINDS = {"all ids": {}, "top 4, js": {"top_k": 4, "divergence": "js"}}


def test_a_student_learns_more_from_a_teacher_than_from_labels(tmp_path: Path) -> None:
    said = start("distill.py", "--teacher-steps", 30, "--steps", 30, "--sentences", 2, "--lr", 2e-2, "--out", tmp_path)
    found = {
        method: (float(kl), float(agreed))
        for method, kl, agreed in re.findall(
            r"^(.*): held-out KL to the teacher (\S+), agreement (\S+)$", said, re.MULTILINE
        )
    }
    assert found["distilled"][0] < 0.6 * found["labels alone"][0]
    assert found["distilled"][1] > 0.4
    kept = rows(tmp_path / "metrics.jsonl")
    assert kept[-1]["method"] == "distilled" and kept[-1]["held-out KL"] < 0.5 * kept[0]["held-out KL"]
    for method in found:
        mine = [r for r in kept if r["method"] == method]
        assert [r["step"] for r in mine] == list(range(31))
        # Nobody has learnt anything yet: both start from the same params.
        assert mine[0]["held-out KL"] == kept[0]["held-out KL"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_learns_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distill, a = example("distill", monkeypatch), argparse.Namespace(**{**vars(FEW), **KINDS[kind]})
    alone = trained(distill, a, fstep.Mesh())
    for sizes in ({"pp": 2}, {"cp": 2}, {"tp": 2}) if kind == "all ids" else ({"pp": 2}, {"dp": 2}):
        for found in fstep.simulate(lambda mesh: trained(distill, a, mesh), **sizes):
            same(alone, found)


def test_the_divergence_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    distill = example("distill", monkeypatch)
    forward, reverse, js = (
        trained(
            distill, argparse.Namespace(**{**vars(FEW), "teacher_steps": 8, "steps": 1, "divergence": kind}), fstep.Mesh()
        )[-1]["loss"]
        for kind in ("forward", "reverse", "js")
    )
    assert 0 < js < 0.6932 < min(forward, reverse) and forward != pytest.approx(reverse, rel=1e-3)  # js is at most log 2


def test_all_ids_of_the_top_are_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    distill = example("distill", monkeypatch)
    whole, top, few = (
        trained(distill, argparse.Namespace(**{**vars(FEW), "steps": 1, "top_k": k}), fstep.Mesh())
        for k in (0, distill.VOCAB, 2)
    )
    same(whole, top)
    assert whole[-1]["loss"] > 1.01 * few[-1]["loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--divergence", "sideways"], "argument --divergence: invalid choice: 'sideways'"),
        (["--top-k", 265], "argument --top-k: 265 is not from 0 (all) to the 264 ids there are"),
        (["--sentences", 0], "argument --sentences: 0 is not 1 or more"),
        (["--tp", 0], "argument --tp: 0 is not 1 or more"),
    ],
)
def test_wrong_arguments(
    arguments: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(example("distill", monkeypatch), monkeypatch, [*arguments, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_equal_rows_are_an_equal_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = example("curves", monkeypatch)
    seeds = [[{"step": i, "a": i * k, **({"b": 1.0 / (i + k)} if i % 3 == 0 else {})} for i in range(7)] for k in (1, 2, 3)]
    for name in ("one.svg", "two.svg", "three.png"):
        assert curves.draw_curves({"m": seeds, "n": seeds[:1]}, ["a", "b"], tmp_path / name) == f"curves: {tmp_path / name}"
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text()
    assert all(f">{word}</text>" in one for word in ("a", "b", "m", "n", "step"))
    other = [[{**row, "a": 2 * row["a"]} for row in seed] for seed in seeds]
    curves.draw_curves({"m": other, "n": seeds[:1]}, ["a", "b"], tmp_path / "two.svg")
    assert one != (tmp_path / "two.svg").read_text()


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = example("curves", monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in curves.draw_curves({"m": [[{"step": 0, "a": 1.0}]]}, ["a"], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = example("curves", monkeypatch)
    curves.add_row(tmp_path / "m.jsonl", {"step": 0, "loss": float("nan")})
    curves.add_row(tmp_path / "m.jsonl", {"step": 1, "loss": 0.5})
    assert rows(tmp_path / "m.jsonl") == [{"step": 0, "loss": None}, {"step": 1, "loss": 0.5}]


def test_what_is_held_out_is_in_no_lesson(monkeypatch: pytest.MonkeyPatch) -> None:
    distill, made, make = example("distill", monkeypatch), [], fstep.make_docs
    monkeypatch.setattr(fstep, "make_docs", lambda tokens, **more: [made.append(tokens), make(tokens, **more)][1])
    trained(distill, argparse.Namespace(**{**vars(FEW), "sentences": 48, "steps": 1}), fstep.Mesh())
    _, few, unseen = ({tuple(ids) for ids in docs} for docs in made[:3])
    assert len(unseen) == 64 == len(made[2]) and not unseen & few
