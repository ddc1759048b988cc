"""The example of reinforcement learning: reward rises, the first update is on the policy that drew, every mesh the same."""

import argparse
import functools
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fstep
from tests.examples.test_dpo import example, refused, rows, same, start, trained

FEW = argparse.Namespace(sft_steps=30, steps=3, batch=12, samples=8, updates=2, lr=1e-3)


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained(example("grpo", monkeypatch), FEW, fstep.Mesh())


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example in float64: in float32 AdamW makes a difference of a rounding one of 1e-4 within some thirty steps."""
    grpo = example("grpo", monkeypatch)
    monkeypatch.setattr(grpo.Dense, "init", functools.partialmethod(grpo.Dense.init, dtype=torch.float64))
    return grpo


def test_reward_rises_and_files_are_written(tmp_path: Path) -> None:
    said = start(
        "grpo.py", "--steps", 30, "--samples", 8, "--lr", 2e-3, "--out", tmp_path, "--picture", tmp_path / "curves.svg"
    )
    kept = rows(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in kept] == list(range(31))
    reward = [r["reward"] for r in kept[:-1]]
    assert statistics.mean(reward[-5:]) > statistics.mean(reward[:5]) + 0.15
    assert re.search(r"held-out accuracy: 0\.\d\d -> 0\.\d\d", said) and "before: " in said
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_the_first_update_is_on_the_policy_that_drew_and_the_next_is_not(alone: list[dict[str, Any]]) -> None:
    for row in alone[:-1]:
        assert row["ratio"] == 1 and row["clip_low"] == row["clip_high"] == 0
        assert 0 <= row["kl_generator"] < 1e-5
        assert row["weight"] == pytest.approx(FEW.batch * FEW.samples, rel=1e-6)  # of answers, not of tokens
        assert 0 < row["reward"] < 1 and row["grad_norm"] > 0.01  # there is something to learn
        assert row["last ratio"] != 1 and row["last kl_old"] > 0


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"cp": 2}, {"tp": 2}, {"dp": 3}, {"pp": 2, "dp": 2}], ids=str)
def test_a_mesh_learns_the_same(sizes: dict[str, int], exact: ModuleType) -> None:
    few = argparse.Namespace(**{**vars(FEW), "steps": 2})
    alone = trained(exact, few, fstep.Mesh())
    for found in fstep.simulate(lambda mesh: trained(exact, few, mesh), **sizes):
        same(alone, found)


def test_processes_learn_and_one_of_them_speaks(alone: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = [x for name, value in vars(FEW).items() for x in (f"--{name.replace('_', '-')}", value)]
    said = start("grpo.py", *arguments, "--pp", 2, "--out", tmp_path, processes=2)
    assert said.count("held-out accuracy: ") == 1
    found = rows(tmp_path / "metrics.jsonl")
    assert found[0]["reward"] == alone[0]["reward"] and len(found) == len(alone)


def test_rewards_are_those_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo = example("grpo", monkeypatch)
    assert [grpo.reward(text) for text in ("7+5=12", "7+5=1", "7+5=", "7+5=12=", "0+0=0", "7+5=012")] == [1, 0, 0, 0, 1, 0]
    at, key = grpo.tiny.Place(fstep.Mesh(), torch.device("cpu")), fstep.Key.seed(0)
    docs, texts = grpo.answer(grpo.MODEL.init(key), torch.tensor([75, 0]), key, at, samples=3)
    assert [text.partition("=")[0] for text in texts] == ["7+5"] * 3 + ["0+0"] * 3
    assert docs.per_document["reward"].tolist() == [grpo.reward(text) for text in texts]
    assert docs.per_document["prompt"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_sum_that_is_held_out_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo, asked = example("grpo", monkeypatch), []
    answer = grpo.answer
    monkeypatch.setattr(grpo, "answer", lambda p, n, *a, **how: [asked.append((n, how)), answer(p, n, *a, **how)][1])
    trained(grpo, argparse.Namespace(**{**vars(FEW), "batch": 80, "steps": 1, "samples": 1}), fstep.Mesh())
    held_out = {tuple(n.tolist()) for n, how in asked if "temperature" in how}
    (drawn,) = [set(n.tolist()) for n, how in asked if "samples" in how]
    assert len(held_out) == 1 and len(*held_out) == 20 and len(drawn) == 80
    assert not drawn & set(*held_out)
    for digit in range(10):  # of all kinds
        assert sum(n // 10 == digit for n in drawn) == sum(n % 10 == digit for n in drawn) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--samples", 0], "--samples"), (["--lr", -1], "--lr"), (["--pp", 2], "pp"), (["--picture", "x.gif"], "x.gif")],
)
def test_wrong_arguments_are_one_line(arguments: list[object], message: str, monkeypatch: Any, capsys: Any) -> None:
    assert message in refused(example("grpo", monkeypatch), monkeypatch, arguments, capsys)
