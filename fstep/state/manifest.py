"""A checkpoint's manifest: which tensors there are, which file has which part of each, and which folders are checkpoints.

    {"format": "fstep checkpoint", "version": 2, "step": 100,
     "files": {"tensors-rank00001-00000.safetensors": {"size": ..., "header_size": ..., "header_crc32": ...}, ...},
     "leaves": {"params.embed": {"dtype": "F32", "shape": [32, 8], "parts": [
         {"file": "tensors-rank00000-00000.safetensors", "box": [[0, 16], [0, 8]]},
         {"file": "tensors-rank00001-00000.safetensors", "box": [[16, 32], [0, 8]]}]}, ...},
     "crc32": of all before}

A part is a tensor of the leaf's name in its file. Version 1 had one file for each leaf, and the whole leaf in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fstep.state.files import DTYPE_OF, DTYPES, Written, listed
from fstep.state.folders import REPLACED, seal_json, unseal_json
from fstep.state.parts import Part, part_from_json, part_to_json, whole

FORMAT, VERSION, READABLE = "fstep checkpoint", 2, (1, 2)
MANIFEST = "manifest.json"
STEP = r"step-(\d{8,})"


class CheckpointError(ValueError):
    """Raised when a checkpoint cannot be written, found or trusted, or does not fit the state asked for.

    >>> import fstep
    >>> fstep.load_checkpoint("no/such/folder", like={})
    Traceback (most recent call last):
    fstep.state.manifest.CheckpointError: load_checkpoint: no checkpoint, there is no folder no/such/folder; ...
    """


@dataclass(frozen=True)
class Leaf:
    """A saved tensor: what it is, and its parts, each with the name of the file that has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Part], ...]


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint."""

    step: int
    files: Mapping[str, Written]
    leaves: Mapping[str, Leaf]


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error that says so."""
    return CheckpointError(f"load_checkpoint: {path} is damaged: {what}; load another checkpoint with step=")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it into the checkpoint's folder."""
    text = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "files": {name: dict(vars(written)) for name, written in manifest.files.items()},
        "leaves": {
            path: {
                "dtype": DTYPES[leaf.dtype],
                "shape": list(leaf.shape),
                "parts": [{"file": file, **part_to_json(part)} for file, part in leaf.parts],
            }
            for path, leaf in manifest.leaves.items()
        },
    }
    (folder / MANIFEST).write_bytes(seal_json(text))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint's folder."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error
    text = unseal_json(raw)
    if text is None:
        raise damaged(path, "its checksum does not match")
    if text["format"] != FORMAT or text["version"] not in READABLE:
        raise CheckpointError(
            f"load_checkpoint: {path} is {text['format']!r} version {text['version']}, this fstep reads {FORMAT!r} "
            f"versions {READABLE[0]} to {READABLE[-1]}; load it with the fstep that wrote it"
        )

    def leaf(entry: dict[str, Any]) -> Leaf:
        shape = tuple(entry["shape"])
        if "parts" in entry:
            parts = tuple((part["file"], part_from_json(part)) for part in entry["parts"])
        else:
            parts = ((entry["file"], whole(shape)),)
        return Leaf(DTYPE_OF[entry["dtype"]], shape, parts)

    return Manifest(
        text["step"],
        {name: Written(**entry) for name, entry in text["files"].items()},
        {path: leaf(entry) for path, entry in text["leaves"].items()},
    )


def complete(folder: Path) -> dict[int, Path]:
    """Map step numbers to folders. One being replaced counts until its successor has landed."""
    found: dict[int, Path] = {}
    # In reverse order step-N comes after step-N.replaced, and wins.
    for entry in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        match = re.fullmatch(f"{STEP}({re.escape(REPLACED)})?", entry.name)
        if match and (entry / MANIFEST).exists():
            found[int(match[1])] = entry
    return found


def find(folder: Path, step: int | None) -> Path:
    """Return the folder of a step, or of the latest; raise if there is none."""
    found = complete(folder)
    wanted = max(found, default=None) if step is None else step
    if wanted in found:
        return found[wanted]
    what = "load_checkpoint: no checkpoint" + ("" if step is None else f" of step {step}")
    if not folder.is_dir():
        raise CheckpointError(f"{what}, there is no folder {folder}; pass the folder given to save_checkpoint")
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{what} in {folder}, which is one itself; pass its parent folder, and step=")
    partial = [e.name for e in sorted(folder.iterdir()) if re.fullmatch(STEP, e.name) and e not in found.values()]
    raise CheckpointError(
        f"{what} in {folder}, which has "
        + (f"those of steps {sorted(found)}" if found else "none")
        + (f" and, without their {MANIFEST}, {', '.join(partial)}" if partial else "")
        + "; pass the folder given to save_checkpoint, and a step that it has"
    )


def check_fit(found: Path, leaves: Mapping[str, Leaf], like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Raise unless every leaf of ``like`` was saved, with that dtype and whole shape; return the names it lacks."""
    if names := [path for path in like if path not in leaves]:
        raise misfit(found, "like", "the checkpoint", names, 1)
    for path, (dtype, shape) in like.items():
        if (leaves[path].dtype, leaves[path].shape) != (dtype, shape):
            raise CheckpointError(
                f"load_checkpoint: leaf {path!r} is {leaves[path].dtype} {leaves[path].shape} in {found}, and {dtype} "
                f"{shape} in like; make like with the saved dtype and shape, and convert after loading"
            )
    return [path for path in leaves if path not in like]


def misfit(found: Path, here: str, there: str, names: list[str], ranks: int) -> CheckpointError:
    """Return the error that ``here`` has names that ``there`` lacks, on a mesh of so many ranks."""
    more = ", and pass mesh= if other ranks have the rest" if ranks == 1 and there == "like" else ""
    return CheckpointError(
        f"load_checkpoint: {here} has {listed(names)}, {there} has nothing there ({found}); make like with the config, "
        f"the optimizer and the trainable predicate of the run that saved it{more}"
    )
