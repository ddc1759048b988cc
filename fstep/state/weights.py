"""Hugging Face folders and params trees, one tensor at a time.

A model says where its params come from with a *spec*, a tree of the params' structure with names for tensors::

    params                          spec                                                    model.safetensors
    {"embed":  Tensor(V, D),        {"embed":  HFTensor("model.embed_tokens.weight", (V, D)),    ◄── load_hf
     "layers": {0: {"q": ...}},      "layers": {0: {"q": HFTensor("model.layers.0...", ...)}},   ──► save_hf
     "head":   Tied("embed")}        "head":   Tied("embed")}

A part of a spec loads a part of the params: a subtree the params of a pipeline stage, a leaf inside a `Shard` a slice of a
tensor. Nothing here knows a model family, and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.axis import Mesh
from fstep.mesh.place import Range
from fstep.state.agree import all_ranks, consult, given_mesh
from fstep.state.files import DTYPES, group_by_size, listed, write_safetensors
from fstep.state.folders import whole_folder
from fstep.state.hf_folder import INDEX, SINGLE, HFFolder, WeightsError
from fstep.state.spec import HFTensor, spec_boxes, spec_leaves
from fstep.state.stream import deliver, stream_hf, survey
from fstep.tree import tree_replace_leaves

__all__ = ["HFTensor", "WeightsError", "load_hf", "save_hf", "stream_hf"]

CONFIG = "config.json"


def load_hf(
    folder: str | os.PathLike[str],
    spec: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: Sequence[str] = (),
    strict: bool = True,
    tied: Mapping[str, str] | None = None,
    whole: Any = None,
) -> Any:
    """Read a Hugging Face folder's safetensors into params of the structure of ``spec``.

    Each tensor, or of one inside a `Shard` that part, is read, converted and moved on its own, so the extra memory is that
    of one tensor. Ranks do not talk: each reads what its spec asks for.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        spec: a tree of `HFTensor` and `Tied`, or a part of one: a subtree, leaves inside `Shard`, `Copied` and `Stages`.
            The params have the same nodes.
        dtype: what floating-point tensors are converted to; by default each keeps its own.
        device: where the params go.
        ignore: endings of names that may be on disk although the spec lacks them, e.g. ``"rotary_emb.inv_freq"``.
        strict: whether any other tensor on disk is an error.
        tied: names of tensors that the spec ties, with the path they are tied to, e.g. ``{"lm_head.weight": "embed"}``.
            Such a tensor may be on disk if it has the same bits as the one it is tied to, which is looked at for the part
            that is read.
        whole: the spec of the whole model, if ``spec`` is a part of it. Its tensors have to be on disk, and are what
            ``strict`` means.

    Raises `WeightsError` for a folder that is no model, for missing and unexpected tensors, shapes that differ, damaged
    files, and a tied tensor that differs. In a folder written by `save_hf` the bytes that are read are checked against
    their checksums, in blocks of at most 256 KiB.

    >>> import tempfile, torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_hf(f"{folder}/model", {"w": torch.ones(2)}, spec)
    ...     fstep.load_hf(path, spec, dtype=torch.bfloat16)
    {'w': tensor([1., 1.], dtype=torch.bfloat16)}
    """
    leaves = spec_leaves("load_hf", spec)
    boxes = dict(zip(leaves, spec_boxes("load_hf", spec), strict=True))
    model = leaves if whole is None else spec_leaves("load_hf", whole)
    if odd := [path for path, leaf in leaves.items() if model.get(path) != leaf]:
        raise WeightsError(f"load_hf: spec has {listed(odd)}, and whole has not; make both with the same config")
    names = [leaf.name for leaf in model.values()]
    same = {name: path for name, path in (tied or {}).items() if name not in names}
    if strict and (unknown := [path for path in same.values() if path not in model]):
        raise WeightsError(f"load_hf: tied names {listed(unknown)}, spec has no such leaf; it has {listed(list(model))}")
    with contextlib.ExitStack() as stack:
        source = HFFolder(Path(folder), stack)
        shapes = {leaf.name: tuple(leaf.shape) for leaf in leaves.values()}
        source.check(names, shapes, others=same, ignore=ignore, strict=strict)
        for name, path in same.items():
            if name in source.files and path in leaves:
                source.check_equal(name, leaves[path].name, boxes[path])

        def read(leaf: HFTensor, box: tuple[Range, ...]) -> Tensor:
            x = source.read(leaf.name, box)
            # A copy always: what the file gives may be a view of the file.
            return x.to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype, copy=True)

        return tree_replace_leaves(spec, [read(leaf, boxes[path]) for path, leaf in leaves.items()])


def save_hf(
    folder: str | os.PathLike[str],
    params: Any,
    spec: Any,
    *,
    mesh: Mesh | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write ``params`` as a Hugging Face folder that ``from_pretrained`` loads, whole or not at all; return its path.

    On a mesh every rank calls it with its own params, rank 0 gathers one tensor at a time and writes it. The files are the
    same, byte for byte, from every mesh.

    Args:
        folder: made anew. One that holds a model is replaced, with everything in it; any other is refused.
        params: the tree to write, on any device: this rank's, shards over any axis or replicated.
        spec: a tree of `HFTensor` and `Tied`, that of the whole model.
        mesh: the mesh whose ranks call this. It may be left out in a program that runs on one rank; ``Mesh()`` writes what
            this rank has as if it were all.
        config: written as ``config.json``. Its ``"dtype"`` is what ``from_pretrained`` converts to.
        dtype: what floating-point tensors are converted to; by default each keeps its own.
        max_shard_bytes: start another file when one would grow beyond this.
        extra_files: files to copy into the folder, such as those of the tokenizer.

    Raises `WeightsError` if params and spec differ, if the folder may not be replaced, and without ``mesh`` where there are
    several ranks. An error on one rank is raised on all of them; `MeshError` if a rank is gone.

    >>> import os, tempfile, torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_hf(f"{folder}/model", {"w": torch.ones(2)}, spec, config={"model_type": "mine"})
    ...     sorted(os.listdir(path))
    ['config.json', 'model.safetensors']
    """

    def stored(kind: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and kind.is_floating_point else kind

    def check(leaf: HFTensor, x: Tensor) -> None:
        if stored(x.dtype) not in DTYPES or x.is_meta:
            raise WeightsError(
                f"save_hf: {leaf.name!r} is {stored(x.dtype)} on {x.device}, which no file can hold; pass dtype=, or values"
            )

    everyone = all_ranks("save_hf", given_mesh("save_hf", mesh, error=WeightsError))
    shares = survey("save_hf", params, spec, everyone, check)
    tensors = deliver("save_hf", params, spec, shares, everyone, to_all=False)

    def write() -> None:
        try:
            if everyone.rank == 0:
                leaves = spec_leaves("save_hf", spec).items()
                plan = {leaf.name: (stored(shares[path].dtype), shares[path].shape) for path, leaf in leaves}
                converted = ((name, x.to(plan[name][0])) for name, x in tensors)
                _write(Path(folder), plan, converted, config, max_shard_bytes, extra_files)
        finally:
            for _ in tensors:  # all go through to the end, so that nobody is left waiting when the writer fails
                pass

    consult("save_hf", everyone, write, lambda heard: heard, error=WeightsError)
    return Path(folder)


def _write(
    folder: Path,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, Tensor]],
    config: Mapping[str, Any] | None,
    max_shard_bytes: int,
    extra_files: Sequence[str | os.PathLike[str]],
) -> None:
    """Write a model folder whose tensors come in the order of ``plan``."""
    sizes = {name: kind.itemsize * math.prod(shape) for name, (kind, shape) in plan.items()}
    groups = group_by_size(sizes, max_shard_bytes)
    shards = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        shards = [SINGLE]
    try:
        settings = None if config is None else json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise WeightsError(f"save_hf: config is not JSON: {error}; pass plain values, e.g. config.to_dict()") from error
    written = {*shards, INDEX, CONFIG}
    for file in map(Path, extra_files):
        if not file.is_file() or file.name in written:
            raise WeightsError(f"save_hf: extra_files has {str(file)!r}, no file or of a name already written; leave it out")
        written.add(file.name)
    final = folder.resolve()
    _check_replaceable(final)
    with whole_folder(final) as new:
        for shard, group in zip(shards, groups, strict=True):
            part = itertools.islice(tensors, len(group))
            write_safetensors(new / shard, {name: plan[name] for name in group}, part)
        if shards != [SINGLE]:
            weight_map = {name: shard for shard, group in zip(shards, groups, strict=True) for name in group}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if settings is not None:
            (new / CONFIG).write_text(settings)
        for file in map(Path, extra_files):
            shutil.copyfile(file, new / file.name)


def _check_replaceable(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise WeightsError(f"save_hf: {folder} is a file; pass the path of a folder")
    has = sorted(folder.iterdir())
    if has and not any(entry.name in (SINGLE, INDEX) for entry in has):
        names = listed([entry.name for entry in has])
        raise WeightsError(f"save_hf: {folder} exists and is no model folder, it has {names}; pass another path")
    if inner := [entry.name for entry in has if entry.is_dir()]:
        raise WeightsError(f"save_hf: {folder} would be replaced, folders {listed(inner)} in it too; pass another path")
