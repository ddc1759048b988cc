"""Reading a rank's part of a checkpoint: for each leaf the saved parts that overlap it, and of these the blocks it needs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fstep.state.files import Entry, hex_crc, listed, parse_header, read_head, read_runs
from fstep.state.manifest import Leaf, Manifest, damaged
from fstep.state.parts import Part, runs

Target = tuple[Part, torch.device]


def read_leaves(folder: Path, manifest: Manifest, targets: Mapping[str, Target], *, workers: int) -> list[Tensor]:
    """Return the part of each leaf that ``targets`` asks for, in their order, on the device it names."""
    needed: dict[str, list[str]] = {}
    for path, (part, _) in targets.items():
        for file, saved in manifest.leaves[path].parts:
            if next(runs(saved, part), None) is not None:
                needed.setdefault(file, []).append(path)
    with ThreadPoolExecutor(workers) as pool:
        headers = pool.map(lambda file: _read_header(folder / file, manifest, needed[file]), needed)
        entries = dict(zip(needed, headers, strict=True))

        def read(path: str) -> Tensor:
            part, device = targets[path]
            return _read_leaf(folder, path, manifest.leaves[path], part, entries).to(device)

        return list(pool.map(read, targets))


def _read_header(path: Path, manifest: Manifest, paths: Sequence[str]) -> dict[str, Entry]:
    record = manifest.files[path.name]
    try:
        with open(path, "rb", buffering=0) as file:
            size, head = os.fstat(file.fileno()).st_size, read_head(file.fileno(), record.header_size)
    except (OSError, EOFError) as error:
        raise damaged(path, f"cannot be read ({error}; it holds {listed(paths)})") from error
    if size != record.size:
        raise damaged(path, f"it has {size} bytes, not {record.size} (it holds {listed(paths)})")
    # First its checksum in the manifest: what it says of itself, a file in another's place says too.
    entries = parse_header(head) if hex_crc(head) == record.header_crc32 else None
    if entries is None:
        raise damaged(path, f"the checksum of its header does not match (it holds {listed(paths)})")
    return entries


def _read_leaf(folder: Path, name: str, leaf: Leaf, part: Part, entries: Mapping[str, Mapping[str, Entry]]) -> Tensor:
    out = torch.empty(part.shape, dtype=leaf.dtype)
    found = 0
    for file, saved in leaf.parts:
        if file not in entries:
            continue
        shared = list(runs(saved, part))
        found += sum(length for _, _, length in shared)
        try:
            with open(folder / file, "rb", buffering=0) as opened:
                good = read_runs(opened.fileno(), entries[file][name], shared, out)
        except (OSError, EOFError) as error:
            raise damaged(folder / file, f"cannot be read ({error}; it holds {name!r})") from error
        if not good:
            raise damaged(folder / file, f"the checksum of tensor {name!r} does not match")
    if found != math.prod(part.shape):
        raise damaged(folder, f"its files have {found} of the {math.prod(part.shape)} elements wanted of {name!r}")
    return out
