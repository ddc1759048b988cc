"""An example is read from top to bottom, and its step is the algorithm: neither may grow."""

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["grpo", "dpo", "distill"])
def test_an_example_and_its_step_are_short(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) < 150
    (step,) = [x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef) and x.name == f"{name}_step"]
    assert step.end_lineno is not None and step.end_lineno - step.lineno + 1 < 25
