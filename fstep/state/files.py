"""Folders that exist whole or not at all, and safetensors files whose every byte is checked.

A folder is filled under a name that nobody reads, made durable, and then renamed; the rename is the moment it exists::

    .tmp-new-NAME ──────────────────────────► NAME            the new folder lands
    NAME ───► NAME.replaced ───► .tmp-old-NAME.replaced ───► gone      the one it replaces, if any

Between the two renames of a replacement the old folder is found as ``NAME.replaced``, so a process killed at any
moment leaves one of the two. `settle` tidies up what killed processes left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CRC_KEY = "fstep.crc32"
REPLACED = ".replaced"
_NEW, _OLD = ".tmp-new-", ".tmp-old-"
# Small enough to stay in the processor's cache between its checksum and its copy.
_CHUNK = 1 << 20

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a tensor lies in its file, counted from the file's first byte, and the checksum of its bytes."""

    offset: int
    nbytes: int
    crc32: str


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write_safetensors` wrote: the file's size, its header's size and checksum, and each tensor's `Span`."""

    size: int
    header_size: int
    header_crc32: str
    spans: dict[str, Span]


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Write names for an error message, and the count of those that are too many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def hex_crc(data: bytes | memoryview) -> str:
    """Return the CRC-32 of ``data`` as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def tensor_crc(x: Tensor) -> str:
    """Return the CRC-32 of a tensor's elements, in memory order of a contiguous copy."""
    crc = 0
    for chunk in _chunks(_bytes(x)):
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _bytes(x: Tensor) -> memoryview:
    """View the elements as bytes; shares memory with a contiguous tensor of the CPU."""
    x = x.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().data


def _chunks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cut names, in their order, into runs whose sizes add up to ``limit`` at most; a larger one has its own."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def write_safetensors(
    path: Path, plan: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> Written:
    """Write one safetensors file from ``(name, tensor)`` pairs, holding one tensor at a time in host memory.

    ``plan`` gives the dtype and shape of every tensor, from which the layout follows; the pairs may come in any order.
    The checksums go into the header's metadata under ``"fstep.crc32"``.
    """
    # Wider elements first: then every tensor is aligned to its element's size.
    order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
    sizes = {name: plan[name][0].itemsize * torch.Size(plan[name][1]).numel() for name in order}
    begin, end = {}, 0
    for name in order:
        begin[name] = end
        end += sizes[name]

    def header(crcs: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt", CRC_KEY: json.dumps(crcs)}}
        for name in order:
            dtype, shape = plan[name]
            offsets = [begin[name], begin[name] + sizes[name]]
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    # The header precedes the data it holds the checksums of: leave room for it, and write it last.
    crcs = dict.fromkeys(order, "0" * 8)
    start = len(header(crcs))
    todo = set(order)
    with open(path, "wb") as file:
        for name, x in tensors:
            if (x.dtype, tuple(x.shape)) != (plan[name][0], tuple(plan[name][1])):
                raise ValueError(f"write_safetensors: {name!r} is {x.dtype} {tuple(x.shape)}, planned {plan[name]}")
            todo.remove(name)
            file.seek(start + begin[name])
            crc = 0
            for chunk in _chunks(_bytes(x)):
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            crcs[name] = f"{crc:08x}"
        if todo:
            raise ValueError(f"write_safetensors: no tensor came for {sorted(todo)}")
        head = header(crcs)
        file.seek(0)
        file.write(head)
    spans = {name: Span(start + begin[name], sizes[name], crcs[name]) for name in order}
    return Written(start + end, start, hex_crc(head), spans)


def read_tensor(file: BinaryIO, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> tuple[Tensor, str]:
    """Read a tensor into fresh memory and return it with the checksum of what was read."""
    out = torch.empty(tuple(shape), dtype=dtype)
    file.seek(offset)
    crc = 0
    for chunk in _chunks(_bytes(out)):
        count = file.readinto(chunk)  # type: ignore[attr-defined]
        crc = zlib.crc32(chunk[:count], crc)
    return out, f"{crc:08x}"


def seal_json(value: Mapping[str, Any]) -> bytes:
    """Write an object as JSON whose last entry is the checksum of everything before that entry."""
    text = json.dumps(value, indent=1).encode().removesuffix(b"\n}")
    return text + _seal(text)


def unseal_json(raw: bytes) -> dict[str, Any] | None:
    """Read what `seal_json` wrote, or return ``None`` if a byte of it has changed."""
    text = raw[: -len(_seal(b""))]
    # Compared as text, not as a number: a flipped bit turns the digit "a" into "A".
    return json.loads(raw) if raw == text + _seal(text) else None


def _seal(text: bytes) -> bytes:
    return b',\n "crc32": "' + hex_crc(text).encode() + b'"\n}\n'


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(parent: Path, names: str) -> None:
    """Tidy up in ``parent`` what killed processes left of folders whose name matches the pattern ``names``.

    Half-written and half-deleted folders go; a replaced folder goes if the one that replaced it landed, and gets its
    name back if not.
    """
    ours = re.compile(f"(?P<final>{names})(?P<replaced>{re.escape(REPLACED)})?")
    for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
        prefix = next((p for p in (_NEW, _OLD) if entry.name.startswith(p)), "")
        match = ours.fullmatch(entry.name.removeprefix(prefix))
        if not match:
            continue
        if prefix:
            shutil.rmtree(entry)
        elif match["replaced"]:
            final = parent / match["final"]
            if final.exists():
                discard(entry)
            else:
                os.rename(entry, final)


def discard(folder: Path) -> None:
    """Delete a folder; killed halfway, it leaves nothing that looks like one."""
    doomed = folder.with_name(_OLD + folder.name)
    os.rename(folder, doomed)
    sync(folder.parent)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. If the block ends well it becomes ``final``, durable and whole; else it is gone.

    A folder that has that name already is replaced; until the new one has landed, the old one is there.
    """
    parent = final.parent
    absent = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        sync(folder.parent)
    settle(parent, re.escape(final.name))
    new, replaced = final.with_name(_NEW + final.name), final.with_name(final.name + REPLACED)
    new.mkdir()
    try:
        yield new
        for file in sorted(new.iterdir()):
            sync(file)
        sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if final.exists():
        os.rename(final, replaced)
    os.rename(new, final)
    sync(parent)
    if replaced.exists():
        discard(replaced)
