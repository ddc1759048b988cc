"""benchmarks/head.py compares equals, and sees what is wrong."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import fstep


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    from benchmarks import measure

    monkeypatch.setitem(__import__("sys").modules, "measure", measure)
    return importlib.import_module("benchmarks.head")


def test_all_sides_do_the_same(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.check()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[-1] == "equal"


@pytest.mark.parametrize("wrong", ["weights", "temperature"])
def test_a_wrong_side_is_seen(wrong: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fstep.token_logprob_sum
    factor = {"weights": (1.001, 1.0), "temperature": (1.0, 1.001)}[wrong]

    def off(hidden: Any, weight: Any, labels: Any, weights: torch.Tensor) -> torch.Tensor:
        return right(hidden, weight, labels, weights * factor[0], temperature=factor[1])

    monkeypatch.setattr(fstep, "token_logprob_sum", off)
    with pytest.raises(SystemExit, match="fstep's sum is wrong"):
        script.check()
