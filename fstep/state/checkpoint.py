"""Checkpoints: a state on disk, bit for bit, or an error.

    runs/
      step-00000100/
        manifest.json              every leaf: file, place, dtype, shape, checksum; every file: size, header's checksum
        tensors-00000.safetensors  the leaves, under their paths, about 1 GiB a file
      step-00000200/
      .tmp-new-step-00000300/      being written, or left by a killed run; never read, removed by the next save

A folder named ``step-*`` was complete and on the disk before it got its name. Each tensor, each file's header and the
manifest carry a CRC-32, which loading checks. Nothing is pickled, so loading runs no code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fstep.state import files
from fstep.tree import tree_leaves, tree_paths, tree_replace_leaves

FORMAT, VERSION = "fstep checkpoint", 1
MANIFEST = "manifest.json"
_STEP = r"step-(\d{8,})"
_GROUP_BYTES = 1 << 30
_WORKERS = min(8, os.cpu_count() or 1)
_DTYPE = {name: dtype for dtype, name in files.DTYPES.items()}


class CheckpointError(ValueError):
    """Raised when a checkpoint cannot be written, found or trusted, or does not fit the state asked for.

    >>> import fstep
    >>> fstep.load_checkpoint("no/such/folder", like={})
    Traceback (most recent call last):
    fstep.state.checkpoint.CheckpointError: load_checkpoint: no checkpoint, there is no folder no/such/folder; ...
    """


def save_checkpoint(folder: str | os.PathLike[str], state: Any, *, keep: int | None = None, step: int | None = None) -> Path:
    """Write ``state`` to ``folder/step-00000123``, whole or not at all, and return that path.

    Args:
        folder: where the run keeps its checkpoints; made if it does not exist. One process writes to it at a time.
        state: any tree of tensors, on any device. Leaves may be views, non-contiguous or share storage.
        keep: after the new checkpoint has landed, delete all but it and the ``keep - 1`` latest others.
        step: the number to file it under; by default ``state.step``.

    A checkpoint of the same step is replaced. A process killed at any moment leaves every complete checkpoint loadable,
    and at most a folder named ``.tmp-*`` that the next save removes. Host memory holds a few tensors at a time.

    Raises `CheckpointError` for a leaf that is no tensor or has a dtype the format lacks, and for a bad ``keep``.

    >>> import tempfile, torch, fstep
    >>> state = fstep.init_state({"w": torch.ones(2)}, fstep.sgd)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fstep.save_checkpoint(folder, state).name
    'step-00000000'
    """
    who = "save_checkpoint"
    if keep is not None and keep < 1:
        raise CheckpointError(f"{who}: keep={keep} would delete what was just saved; pass 1 or more, or None for all")
    if step is None:
        if not isinstance(getattr(state, "step", None), int | Tensor):
            raise CheckpointError(f"{who}: {type(state).__name__} has no .step to name the checkpoint by; pass step=")
        step = int(state.step)
    if step < 0:
        raise CheckpointError(f"{who}: step={step} is negative; pass the number of steps taken")
    leaves = _named_tensors(who, "state", state)
    for path, x in leaves.items():
        if x.is_meta or x.layout is not torch.strided or x.dtype not in files.DTYPES:
            raise CheckpointError(
                f"{who}: leaf {path!r} is a {x.dtype} tensor ({x.layout}, on {x.device}), which a checkpoint cannot "
                f"hold; store dense values of one of {sorted(files.DTYPES.values())}"
            )
    _wait_for_devices(leaves)

    folder = Path(folder)
    files.settle(folder, _STEP)
    final = folder / f"step-{step:08d}"
    parts = files.group_by_size({path: x.nbytes for path, x in leaves.items()}, _GROUP_BYTES)
    groups = {f"tensors-{i:05d}.safetensors": part for i, part in enumerate(parts)}
    with files.whole_folder(final) as new:

        def write(name: str) -> files.Written:
            group = {path: leaves[path] for path in groups[name]}
            return files.write_safetensors(new / name, {p: (x.dtype, x.shape) for p, x in group.items()}, group.items())

        with ThreadPoolExecutor(_WORKERS) as pool:
            written = dict(zip(groups, pool.map(write, groups), strict=True))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": {name: _file_entry(done) for name, done in written.items()},
            "leaves": {
                path: _leaf_entry(name, leaves[path], span)
                for name, done in written.items()
                for path, span in done.spans.items()
            },
        }
        (new / MANIFEST).write_bytes(files.seal_json(manifest))
    if keep is not None:
        others = {number: path for number, path in _complete(folder).items() if number != step}
        for number in sorted(others)[: max(0, len(others) - (keep - 1))]:
            files.discard(others[number])
    return final


def load_checkpoint(
    folder: str | os.PathLike[str], like: Any, *, step: int | None = None, device: torch.device | str | None = None
) -> Any:
    """Return the state saved in ``folder``, bit for bit, in the structure of ``like``.

    Args:
        folder: the folder given to `save_checkpoint`.
        like: a tree of the same structure, dtypes and shapes, such as a freshly made state; its values are not read,
            so its tensors may be on the meta device.
        step: which checkpoint; by default the latest complete one.
        device: where the tensors go; by default where those of ``like`` are, with the CPU in place of meta.

    Raises `CheckpointError` if there is none, if a byte differs from what was saved (naming file and tensor), or if
    paths, shapes or dtypes are not those of ``like``: a leaf that is ``None`` in one of the two is such a difference.

    >>> import tempfile, torch, fstep
    >>> state = fstep.init_state({"w": torch.ones(2)}, fstep.sgd)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_checkpoint(folder, state)
    ...     fstep.load_checkpoint(folder, like=state).params
    {'w': tensor([1., 1.])}
    """
    wanted = _named_tensors("load_checkpoint", "like", like)
    found = _find(Path(folder), step)
    manifest = _read_manifest(found / MANIFEST)
    entries: dict[str, dict[str, Any]] = manifest["leaves"]
    _check_fit(found, entries, wanted)

    def home(x: Tensor) -> torch.device:
        return torch.device(device) if device is not None else torch.device("cpu") if x.is_meta else x.device

    def read(name: str) -> dict[str, Tensor]:
        targets = {path: home(wanted[path]) for path, entry in entries.items() if entry["file"] == name}
        return _read_file(found / name, manifest["files"][name], entries, targets)

    loaded: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_WORKERS) as pool:
        for part in pool.map(read, manifest["files"]):
            loaded |= part
    return tree_replace_leaves(like, [loaded[path] for path in wanted])


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """Return the number of the latest complete checkpoint in ``folder``, or ``None`` if it holds none.

    >>> import fstep
    >>> fstep.latest_step("no/such/folder") is None
    True
    """
    return max(_complete(Path(folder)), default=None)


def _wait_for_devices(leaves: Mapping[str, Tensor]) -> None:
    # Files are written by other threads, whose streams do not wait for work queued on the caller's.
    for device in {x.device for x in leaves.values() if x.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


def _named_tensors(who: str, argument: str, tree: Any) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if not isinstance(leaf, Tensor):
            raise CheckpointError(
                f"{who}: {argument} has a {type(leaf).__name__} at {path!r}; make it a tensor, or a static field if it "
                "is part of the structure"
            )
        if path in named:
            raise CheckpointError(f"{who}: {argument} has two leaves with the path {path!r}; use keys without dots")
        named[path] = leaf
    return named


def _file_entry(done: files.Written) -> dict[str, Any]:
    return {"size": done.size, "header_size": done.header_size, "header_crc32": done.header_crc32}


def _leaf_entry(file: str, x: Tensor, span: files.Span) -> dict[str, Any]:
    shape = list(x.shape)
    return {"file": file, "offset": span.offset, "dtype": files.DTYPES[x.dtype], "shape": shape, "crc32": span.crc32}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    manifest = files.unseal_json(raw)
    if manifest is None:
        raise _damaged(path, "its checksum does not match")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise CheckpointError(
            f"load_checkpoint: {path} is {manifest['format']!r} version {manifest['version']}, this fstep reads "
            f"{FORMAT!r} version {VERSION}; load it with the fstep that wrote it"
        )
    return manifest


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"load_checkpoint: {path} is damaged: {what}; load another checkpoint with step=")


def _complete(folder: Path) -> dict[int, Path]:
    """Map step numbers to folders. One being replaced counts until its successor has landed."""
    found: dict[int, Path] = {}
    # In reverse order step-N comes after step-N.replaced, and wins.
    for entry in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        match = re.fullmatch(f"{_STEP}({re.escape(files.REPLACED)})?", entry.name)
        if match and (entry / MANIFEST).exists():
            found[int(match[1])] = entry
    return found


def _find(folder: Path, step: int | None) -> Path:
    found = _complete(folder)
    wanted = max(found, default=None) if step is None else step
    if wanted in found:
        return found[wanted]
    what = "load_checkpoint: no checkpoint" + ("" if step is None else f" of step {step}")
    if not folder.is_dir():
        raise CheckpointError(f"{what}, there is no folder {folder}; pass the folder given to save_checkpoint")
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{what} in {folder}, which is one itself; pass its parent folder, and step=")
    partial = [e.name for e in sorted(folder.iterdir()) if re.fullmatch(_STEP, e.name) and e not in found.values()]
    raise CheckpointError(
        f"{what} in {folder}, which has "
        + (f"those of steps {sorted(found)}" if found else "none")
        + (f" and, without their {MANIFEST}, {', '.join(partial)}" if partial else "")
        + "; pass the folder given to save_checkpoint, and a step that it has"
    )


def _check_fit(found: Path, entries: Mapping[str, Mapping[str, Any]], like: Mapping[str, Tensor]) -> None:
    for here, there, names in (
        ("the checkpoint", "like", [p for p in entries if p not in like]),
        ("like", "the checkpoint", [p for p in like if p not in entries]),
    ):
        if names:
            raise CheckpointError(
                f"load_checkpoint: {here} has {files.listed(names)}, {there} has nothing there ({found}); make like with "
                "the config, the optimizer and the trainable predicate of the run that saved it"
            )
    for path, x in like.items():
        saved = (_DTYPE[entries[path]["dtype"]], tuple(entries[path]["shape"]))
        if saved != (x.dtype, tuple(x.shape)):
            raise CheckpointError(
                f"load_checkpoint: leaf {path!r} is {saved[0]} {saved[1]} in {found}, and {x.dtype} {tuple(x.shape)} "
                "in like; make like with the saved dtype and shape, and convert after loading"
            )


def _read_file(
    path: Path,
    record: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, torch.device],
) -> dict[str, Tensor]:
    out = {}
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record["size"]:
                raise _damaged(path, f"it has {size} bytes, not {record['size']} (it holds {files.listed(list(targets))})")
            if files.hex_crc(file.read(record["header_size"])) != record["header_crc32"]:
                raise _damaged(path, f"the checksum of its header does not match (it holds {files.listed(list(targets))})")
            for name, device in targets.items():
                entry = entries[name]
                x, crc = files.read_tensor(file, entry["offset"], _DTYPE[entry["dtype"]], entry["shape"])
                if crc != entry["crc32"]:
                    raise _damaged(path, f"the checksum of tensor {name!r} does not match")
                out[name] = x.to(device)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error}; it holds {files.listed(list(targets))})") from error
    return out
