"""The example of preferences as a user runs it: it learns, on every mesh the same, and says what it cannot do."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fstep

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = argparse.Namespace(sft_steps=2, steps=3, batch=4, lr=3e-3, beta=0.1, nll=1.0)


def start(script: str, *arguments: object, processes: int = 1) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch = ["-W", "error"] if processes == 1 else torchrun
    command = [sys.executable, *launch, EXAMPLES / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), name


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def trained(module: ModuleType, a: argparse.Namespace, mesh: fstep.Mesh) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    module.train(a, 0, module.tiny.Place(mesh, torch.device("cpu")), found.append)
    return found


def refused(module: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[object], capsys: Any) -> str:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{module.__name__}.py: ") and "\n" not in said
    return said


def test_a_rule_is_learnt_from_pairs_and_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an older run, which this one replaces\n")
    more = ["--lr", 3e-3, "--batch", 16, "--nll", 0, "--out", tmp_path, "--picture", tmp_path / "curves.svg"]
    said = start("dpo.py", "--sft-steps", 12, "--steps", 24, *more)
    first, last = re.search(r"held-out accuracy: (\S+) -> (\S+)", said).groups()
    assert first == "0.500" and float(last) > 0.7
    assert all(word in said for word in ("before:", "after:", "24/24", "held-out questions"))
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == list(range(25))


def test_a_pipeline_of_processes_learns_the_same(alone: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = [x for name, value in vars(FEW).items() for x in (f"--{name.replace('_', '-')}", value)]
    said = start("dpo.py", *arguments, "--pp", 2, "--out", tmp_path, processes=2)
    same([{"seed": 0, **row} for row in alone], rows(tmp_path / "metrics.jsonl"))
    assert said.count("held-out accuracy: ") == 1  # one rank speaks
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"cp": 2}, {"tp": 2}, {"dp": 2}], ids=str)
def test_a_mesh_learns_the_same(sizes: dict[str, int], alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = example("dpo", monkeypatch)
    for found in fstep.simulate(lambda mesh: trained(dpo, FEW, mesh), **sizes):
        same(alone, found)


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained(example("dpo", monkeypatch), FEW, fstep.Mesh())


def test_the_first_step_stands_where_the_reference_does(alone: list[dict[str, Any]]) -> None:
    first = alone[0]
    assert first["reward_margin"] == first["held-out reward_margin"] == 0
    assert first["accuracy"] == first["held-out accuracy"] == 0.5
    # The loss is log 2, and the likelihood of the chosen answers beside it.
    assert first["loss"] - FEW.nll * first["chosen_nll"] == pytest.approx(0.693147, rel=1e-5)
    assert first["weight"] == FEW.batch
    assert first["reward_chosen"] == 0 != alone[1]["reward_chosen"]
    assert alone[1]["reward_margin"] != 0  # the state has moved, and the reference has not


def test_no_question_is_both_trained_on_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo, drawn = example("dpo", monkeypatch), []
    select = dpo.select_pairs
    monkeypatch.setattr(dpo, "select_pairs", lambda docs, pairs: [drawn.append(pairs.tolist()), select(docs, pairs)][1])
    trained(dpo, argparse.Namespace(**{**vars(FEW), "batch": 170, "steps": 1}), fstep.Mesh())
    held_out, batch, again = drawn
    assert held_out == again and len(batch) == 170 > len(set(batch))  # more than there are: some come twice
    assert sorted({*held_out, *batch}) == list(range(len(dpo.preferences()))) and not {*held_out} & {*batch}
    # Of both kinds of question, since what is held out asks for the rule.
    for numbers in ({*held_out}, {*batch}):
        after = sum(" after " in dpo.preferences()[n][0] for n in numbers)
        assert abs(2 * after - len(numbers)) <= 4


def test_the_chosen_document_is_the_question_with_the_better_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = example("dpo", monkeypatch)
    docs = dpo.make_pairs()
    texts = [dpo.decode(ids.tolist()) for ids in docs.tokens.split(docs.lengths.tolist())]
    answers = [
        dpo.decode(t[w > 0].tolist())
        for t, w in zip(*(x.split(docs.lengths.tolist()) for x in (docs.tokens, docs.weights)), strict=True)
    ]
    for n, (question, better, worse) in enumerate(dpo.preferences()):
        for chosen, answer in ((True, better), (False, worse)):
            at = (docs.per_document["pair"] == n) & (docs.per_document["chosen"] == chosen)
            (i,) = at.nonzero()[:, 0].tolist()
            assert texts[i] == question + answer and answers[i] == answer


def test_what_comes_after_is_better_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    tinydata = example("tinydata", monkeypatch)
    for question, better, worse in tinydata.preferences():
        assert better.startswith("The answer is ") == ("after" in question)
        assert {better, worse} == {max(better, worse, key=len), max(better, worse, key=len).removeprefix("The answer is ")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beta", 0], "argument --beta: 0 is no number above 0"),
        (["--nll", -1], "argument --nll: -1 is no number of 0 or more"),
        (["--steps", 0], "argument --steps: 0 is not 1 or more"),
        (["--batch", "many"], "argument --batch: invalid count value: 'many'"),
        (["--picture", "curves.gif"], "argument --picture: curves.gif is no .svg and no .png"),
        (["--pp", 2], "mesh_from_env: pp 2 = 2 does not divide 1 process"),
    ],
)
def test_wrong_arguments(
    arguments: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(example("dpo", monkeypatch), monkeypatch, [*arguments, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
