"""What is installed: a wheel with both packages whole, their types and the licence, which imports by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: building writes build/ and *.egg-info beside the sources.
    copy = tmp_path_factory.mktemp("source") / "fstep"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=ignore)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in [("fstep", "fstep"), ("models", "fstep_models")]
        for file in (ROOT / folder).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    assert {"fstep/py.typed", "fstep_models/py.typed"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_carries_its_licence_and_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        text = archive.read(licence).decode()
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(archive.read(metadata).decode())
    assert text == (ROOT / "LICENSE").read_text("utf-8")
    assert "Version 2.0, January 2004" in text
    assert "The fstep authors" in text
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    required = {r.split(">=")[0] for r in about.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert required == {"torch", "transformers", "optree", "safetensors", "typing-extensions", "tqdm"}


def test_wheel_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "import fstep, fstep_models; print(fstep.__file__); print(fstep_models.__file__)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(installed / "fstep" / "__init__.py"),
        str(installed / "fstep_models" / "__init__.py"),
    ]
