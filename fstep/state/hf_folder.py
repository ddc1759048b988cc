"""Reading a Hugging Face folder: which tensors it has, and each of them when asked for.

model.safetensors                                        one file, or
model.safetensors.index.json  {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors", ...}}
model-00001-of-00002.safetensors, model-00002-of-00002.safetensors
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fstep.mesh.place import Range
from fstep.state.files import Entry, listed, parse_header, read_head, read_runs
from fstep.state.parts import Part, runs, whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightsError(ValueError):
    """Raised when a folder does not hold the weights a spec describes, or when params do not fit it.

    >>> import fstep
    >>> fstep.load_hf("no/such/folder", spec={})
    Traceback (most recent call last):
    fstep.state.hf_folder.WeightsError: load_hf: there is no folder no/such/folder; ...
    """


class HFFolder:
    """A folder's tensors. ``files`` maps each name to the file that holds it; a file is opened when first read from."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._opened: dict[str, tuple[Any, dict[str, Entry] | None]] = {}
        if not folder.is_dir():
            raise WeightsError(f"load_hf: there is no folder {folder}; download the model first, and pass where it is")
        has = sorted(entry.name for entry in folder.iterdir())
        if SINGLE in has:
            self.files = dict.fromkeys(self._open(SINGLE)[0].keys(), SINGLE)
        elif INDEX in has:
            self.files = self._read_index(has)
        else:
            fix = "pass the folder that from_pretrained would take"
            if any(name.endswith((".bin", ".pt", ".pth")) for name in has):
                fix = "convert its pickled weights: from_pretrained and save_pretrained of transformers write safetensors"
            raise WeightsError(
                f"load_hf: {folder} is no model folder: it needs {SINGLE}, or {INDEX} and the shards, and has "
                f"{listed(has, 10) or 'nothing'}; {fix}"
            )

    def _read_index(self, has: Sequence[str]) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            files: dict[str, str] = dict(json.loads(path.read_bytes())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"load_hf: {path} is no index with a weight_map ({error!r}); get it again") from error
        if absent := sorted({str(file) for file in files.values()} - set(has)):
            raise WeightsError(f"load_hf: {path} names {listed(absent)}, absent from the folder; get the missing files")
        return files

    def _open(self, file: str) -> tuple[Any, dict[str, Entry] | None]:
        """Return a file's tensors, and if we wrote it where they are and their checksums."""
        if file not in self._opened:
            try:
                # The library checks that the header makes sense.
                handle = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
                with open(self.folder / file, "rb", buffering=0) as raw:
                    entries = parse_header(read_head(raw.fileno()))
            except (OSError, EOFError, LookupError, ValueError, TypeError, SafetensorError) as error:
                raise self._damaged(file, str(error)) from error
            self._opened[file] = handle, entries
        return self._opened[file]

    def _damaged(self, file: str, what: str) -> WeightsError:
        return WeightsError(f"load_hf: {self.folder / file} is damaged or cut short: {what}; get the file again")

    def check(
        self,
        names: Collection[str],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        others: Collection[str],
        ignore: Sequence[str],
        strict: bool,
    ) -> None:
        """Raise unless all ``names`` are there, and those in ``shapes`` have these.

        If ``strict``, raise too if there are more names than those, ``others``, and those with an ending in ``ignore``.
        """
        if missing := [name for name in names if name not in self.files]:
            raise WeightsError(
                f"load_hf: {self.folder} lacks {len(missing)} of {len(names)} tensors: {listed(missing, 20)}; it has "
                f"{listed(sorted(self.files))}; make spec with this folder's config"
            )
        known = {*names, *others}
        extra = sorted(name for name in self.files if name not in known and not name.endswith(tuple(ignore)))
        if strict and extra:
            raise WeightsError(
                f"load_hf: {self.folder} has {len(extra)} tensors that spec lacks: {listed(extra, 20)}; make spec with "
                "this folder's config, pass ignore=[ending, ...], or whole= (or strict=False) to load a part"
            )
        wrong = [
            f"{name!r} is {found} and spec says {shape}"
            for name, shape in shapes.items()
            if (found := self._shape(name)) != shape
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise WeightsError(
                f"load_hf: shapes in {self.folder} differ: {'; '.join(wrong[:5])}{more}; make spec with this folder's config"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        file = self.files[name]
        try:
            return tuple(self._open(file)[0].get_slice(name).get_shape())
        except SafetensorError as error:
            raise self._damaged(file, f"{name!r} is not in it ({error})") from error

    def read(self, name: str, box: Sequence[Range] | None = None) -> Tensor:
        """Read one tensor, or the elements of a box of it, and check what is read if its file has checksums.

        The result may be a view of the file.
        """
        file = self.files[name]
        handle, entries = self._open(file)
        full = whole(self._shape(name))
        part = full if box is None else Part(tuple(box))
        try:
            if entries is not None:
                out = torch.empty(part.shape, dtype=entries[name].dtype)
                with open(self.folder / file, "rb", buffering=0) as raw:
                    if not read_runs(raw.fileno(), entries[name], runs(full, part), out):
                        raise self._damaged(file, f"the checksum of tensor {name!r} does not match")
                return out
            if part == full or not part.size:
                found: Tensor = handle.get_tensor(name)
                return found[tuple(slice(*span) for span in part.box)]
            part_of_it: Tensor = handle.get_slice(name)[tuple(slice(*span) for span in part.box)]
            return part_of_it
        except (OSError, EOFError, SafetensorError) as error:
            raise self._damaged(file, f"tensor {name!r}: {error}") from error

    def check_equal(self, name: str, other: str, box: Sequence[Range]) -> None:
        """Raise unless two tensors have the same shape and dtype, and the same bits in a box."""
        same = self._shape(name) == self._shape(other)
        x, y = (self.read(n, box) for n in (name, other)) if same else (torch.empty(0), torch.empty(1))
        if x.dtype != y.dtype or not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))):
            raise WeightsError(
                f"load_hf: spec ties {name!r} to {other!r}, and {self.folder / self.files[name]} holds them apart, "
                "with different values; set tie_word_embeddings=false in the config, and make spec with it"
            )
