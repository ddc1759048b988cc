"""Safetensors files of which any part can be read alone, and no byte of it unchecked.

A tensor's bytes are checked in blocks: bands of rows, and where rows are long, strips of a band::

    [rows, 4 KiB a row]      ┌────┬────┬────┬────┐        one CRC-32 a block, in the header's metadata:
                             │    │    │    │    │        {"w": [64, 4, "8 digits for each block, band by band"]}
                             ├────┼────┼────┼────┤
    64 rows are 256 KiB      │    │    │    │    │        whoever reads some rows, or some columns, reads and checks
                             └────┴────┴────┴────┘        the blocks that have them
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What files of the first version have: one checksum a tensor, of all its bytes.
WHOLE_KEY = "fstep.crc32"
BLOCKS_KEY = "fstep.blocks"
SEAL_KEY = "fstep.seal"  # of the other entries and of the checksums
# A band is small enough to stay in the processor's cache between its checksum and its copy.
_BAND_BYTES = 1 << 18
# Strips are what a tensor-parallel rank reads of a matrix that is cut along its rows.
_STRIPS, _STRIP_BYTES = 16, 1 << 10

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
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}

Run = tuple[int, int, int]


@dataclass(frozen=True)
class Blocks:
    """How a tensor's bytes are cut for checksums: ``rows`` rows a band, ``across`` strips a band, and their checksums."""

    rows: int
    across: int
    crcs: str


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: where its first byte is, counted from the file's, what it is, and its checksums."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Written:
    """What `write_safetensors` wrote: the file's size, its header's size and the header's checksum."""

    size: int
    header_size: int
    header_crc32: str


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Write names for an error message, and the count of those that are too many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def hex_crc(data: bytes | memoryview) -> str:
    """Return the CRC-32 of ``data`` as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def _bytes(x: Tensor) -> memoryview:
    """View the elements as bytes; shares memory with a contiguous tensor of the CPU."""
    x = x.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().data


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


def _row_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the length of a row, which for a tensor of one dimension is an element."""
    return dtype.itemsize * (shape[-1] if len(shape) > 1 else 1)


def _cut(dtype: torch.dtype, shape: Sequence[int]) -> Blocks:
    """Choose the blocks of a tensor, their checksums still to come."""
    row = _row_bytes(dtype, shape)
    if not row or not math.prod(shape):
        return Blocks(1, 1, "")
    across = 1
    while across < _STRIPS and len(shape) > 1 and shape[-1] % (2 * across) == 0 and row // (2 * across) >= _STRIP_BYTES:
        across *= 2
    rows = max(1, _BAND_BYTES // row)
    bands = -(-dtype.itemsize * math.prod(shape) // (rows * row))
    return Blocks(rows, across, "0" * 8 * bands * across)


def _crcs(data: memoryview, across: int, row: int) -> str:
    """Return the checksums of rows of ``row`` bytes, cut into strips."""
    if across == 1:
        return hex_crc(data)
    strips = torch.frombuffer(data, dtype=torch.uint8).view(-1, across, row // across).transpose(0, 1)
    return "".join(map(hex_crc, _bands(_bytes(strips), len(data) // across)))


def write_safetensors(
    path: Path, plan: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> Written:
    """Write one safetensors file from ``(name, tensor)`` pairs, holding one tensor at a time in host memory.

    ``plan`` gives the dtype and shape of every tensor, from which the layout follows; the pairs may come in any order.
    The checksums go into the header's metadata under ``"fstep.blocks"``.
    """
    # Wider elements first: then every tensor is aligned to its element's size.
    order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
    blocks = {name: _cut(*plan[name]) for name in order}
    begin, end = {}, 0
    for name in order:
        begin[name] = end
        end += plan[name][0].itemsize * math.prod(plan[name][1])

    def header(crcs: Mapping[str, str]) -> bytes:
        sums = json.dumps({name: [b.rows, b.across, crcs[name]] for name, b in blocks.items()})
        entries: dict[str, object] = {}
        for name in order:
            dtype, shape = plan[name]
            offsets = [begin[name], begin[name] + dtype.itemsize * math.prod(shape)]
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        meta = {"format": "pt", BLOCKS_KEY: sums, SEAL_KEY: _seal(entries, sums)}
        text = json.dumps({"__metadata__": meta} | entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    # The header precedes the data it holds the checksums of: leave room for it, and write it last.
    crcs = {name: b.crcs for name, b in blocks.items()}
    start = len(header(crcs))
    todo = set(order)
    with open(path, "wb") as file:
        for name, x in tensors:
            if (x.dtype, tuple(x.shape)) != (plan[name][0], tuple(plan[name][1])):
                raise ValueError(f"write_safetensors: {name!r} is {x.dtype} {tuple(x.shape)}, planned {plan[name]}")
            todo.remove(name)
            file.seek(start + begin[name])
            row = _row_bytes(*plan[name])
            found = []
            for band in _bands(_bytes(x), max(1, blocks[name].rows * row)):
                found.append(_crcs(band, blocks[name].across, row))
                file.write(band)
            crcs[name] = "".join(found)
        if todo:
            raise ValueError(f"write_safetensors: no tensor came for {sorted(todo)}")
        head = header(crcs)
        file.seek(0)
        file.write(head)
    return Written(start + end, start, hex_crc(head))


def _seal(entries: Mapping[str, object], sums: str) -> str:
    return hex_crc(json.dumps([entries, sums]).encode())


def _bands(data: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def parse_header(raw: bytes) -> dict[str, Entry] | None:
    """Read the header of a file that `write_safetensors` wrote, or an earlier version of it; ``None`` for another's.

    ``raw`` is the file's first bytes, up to its data. Raises ValueError if a byte of it has changed.
    """
    entries = json.loads(raw[8:])
    meta = entries.pop("__metadata__", {})
    if BLOCKS_KEY in meta:
        if _seal(entries, meta[BLOCKS_KEY]) != meta.get(SEAL_KEY):
            raise ValueError("the checksum of its header does not match")
        blocks = {name: Blocks(*values) for name, values in json.loads(meta[BLOCKS_KEY]).items()}
    elif WHOLE_KEY in meta:
        # One block, of as many rows as there may be.
        blocks = {name: Blocks(1 << 62, 1, crc) for name, crc in json.loads(meta[WHOLE_KEY]).items()}
    else:
        return None
    return {
        name: Entry(len(raw) + entry["data_offsets"][0], DTYPE_OF[entry["dtype"]], tuple(entry["shape"]), blocks[name])
        for name, entry in entries.items()
    }


def read_head(file: int, size: int | None = None) -> bytes:
    """Read the first bytes of an open file, by default those up to its data."""
    if size is None:
        first = bytearray(8)
        _read_into(file, memoryview(first), 0)
        size = 8 + struct.unpack("<Q", first)[0]
    raw = bytearray(size)
    _read_into(file, memoryview(raw), 0)
    return bytes(raw)


def read_runs(file: int, entry: Entry, runs: Iterable[Run], out: Tensor) -> bool:
    """Copy runs of a saved tensor's elements into ``out``; return whether all that was read is as it was written.

    A run is ``(start in the saved tensor, start in out, length)``, in the order of the first. ``out`` is contiguous, on
    the CPU and of the same dtype. Blocks are read one band at a time, and only those that a run touches.
    """
    target, row = _bytes(out), _row_bytes(entry.dtype, entry.shape)
    band_bytes = min(entry.blocks.rows * row, entry.nbytes)
    strip = row // entry.blocks.across
    good = True
    for number, group in itertools.groupby(_by_band(runs, entry.dtype.itemsize, band_bytes), lambda run: run[0]):
        pieces = [(source, to, length) for _, source, to, length in group]
        count = min(band_bytes, entry.nbytes - number * band_bytes)
        first, last = _strips(pieces, row, strip)
        width = (last - first) * strip
        offset = entry.offset + number * band_bytes
        straight = pieces[0][2] == count  # one run has the whole band: no copy
        data = target[pieces[0][1] :][:count] if straight else memoryview(bytearray(count // row * width))
        if width == row:
            _read_into(file, data, offset)
        else:
            for i in range(count // row):
                _read_into(file, data[i * width : (i + 1) * width], offset + i * row + first * strip)
        start = 8 * number * entry.blocks.across
        good &= _crcs(data, last - first, width) == entry.blocks.crcs[start + 8 * first : start + 8 * last]
        for source, to, length in () if straight else pieces:
            at = source // row * width + source % row - first * strip
            target[to : to + length] = data[at : at + length]
    return good


def _by_band(runs: Iterable[Run], itemsize: int, band: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut runs at the ends of bands: (band, first byte in it, first byte in the target, number of bytes)."""
    for source, to, length in runs:
        at, end, shift = source * itemsize, (source + length) * itemsize, (to - source) * itemsize
        while at < end:
            number, inside = divmod(at, band)
            stop = min(end, (number + 1) * band)
            yield number, inside, at + shift, stop - at
            at = stop


def _strips(pieces: Sequence[Run], row: int, strip: int) -> tuple[int, int]:
    """Return the first strip that a piece touches, and the one after the last."""
    first, last = row // strip, 0
    for at, _, length in pieces:
        column = at % row
        if column + length > row:  # it goes on in the next row
            return 0, row // strip
        first, last = min(first, column // strip), max(last, -(-(column + length) // strip))
    return first, last


def _read_into(file: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise EOFError(f"it ends {len(view)} bytes before what should be at byte {offset}")
        view, offset = view[count:], offset + count
