"""Folders that exist whole or not at all, and a JSON text that knows when a byte of it has changed.

A folder is filled under a name that nobody reads, made durable, and then renamed; the rename is the moment it exists::

    .tmp-new-NAME ──────────────────────────► NAME            the new folder lands
    NAME ───► NAME.replaced ───► .tmp-old-NAME.replaced ───► gone      the one it replaces, if any

Between the two renames of a replacement the old folder is found as ``NAME.replaced``, so a process killed at any
moment leaves one of the two. `settle` tidies up what killed processes left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fstep.state.files import hex_crc

REPLACED = ".replaced"
_NEW, _OLD = ".tmp-new-", ".tmp-old-"


def filling(final: Path) -> Path:
    """Return where `whole_folder` makes the folder that will be ``final``."""
    return final.with_name(_NEW + final.name)


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
    new, replaced = filling(final), final.with_name(final.name + REPLACED)
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
