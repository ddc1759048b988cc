"""Hugging Face folders and params trees, one tensor at a time.

A model says where its params come from with a *spec*, a tree of the params' structure with names for tensors::

    params                          spec                                                    model.safetensors
    {"embed":  Tensor(V, D),        {"embed":  HFTensor("model.embed_tokens.weight", (V, D)),    ◄── load_hf
     "layers": {0: {"q": ...}},      "layers": {0: {"q": HFTensor("model.layers.0...", ...)}},   ──► save_hf
     "head":   Tied("embed")}        "head":   Tied("embed")}

A subtree of a spec loads a subtree of the params, which is how a pipeline stage reads its own part. Nothing here knows
a model family, and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fstep.state.files import DTYPES, group_by_size, listed, whole_folder, write_safetensors
from fstep.state.hf_folder import INDEX, SINGLE, HFFolder, WeightsError
from fstep.tree import tree_leaves, tree_map, tree_paths

__all__ = ["HFTensor", "WeightsError", "load_hf", "save_hf", "stream_hf"]

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A leaf of a spec: the tensor's name in a Hugging Face folder, and its shape there and in the params.

    >>> import fstep
    >>> spec = {"embed": fstep.HFTensor("model.embed_tokens.weight", (32, 8)), "head": fstep.Tied("embed")}
    >>> fstep.tree_leaves(spec)
    [HFTensor(name='model.embed_tokens.weight', shape=(32, 8))]
    """

    name: str
    shape: tuple[int, ...]


def load_hf(
    folder: str | os.PathLike[str],
    spec: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: Sequence[str] = (),
    strict: bool = True,
    tied: Mapping[str, str] | None = None,
) -> Any:
    """Read a Hugging Face folder's safetensors into params of the structure of ``spec``.

    Each tensor is read, converted and moved on its own, so the extra memory is that of one tensor.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        spec: a tree of `HFTensor` and `Tied`, or a subtree of one.
        dtype: what floating-point tensors are converted to; by default each keeps its own.
        device: where the params go.
        ignore: endings of names that may be on disk although the spec lacks them, e.g. ``"rotary_emb.inv_freq"``.
        strict: whether any other tensor on disk is an error; pass ``False`` with a subtree.
        tied: names of tensors that the spec ties, with the path they are tied to, e.g. ``{"lm_head.weight": "embed"}``.
            Such a tensor may be on disk if it has the same bits as the one it is tied to.

    Raises `WeightsError` for a folder that is no model, for missing and unexpected tensors, shapes that differ, damaged
    files, and a tied tensor that differs. In a folder written by `save_hf` the bytes of every tensor are checked
    against its checksum.

    >>> import tempfile, torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_hf(f"{folder}/model", {"w": torch.ones(2)}, spec)
    ...     fstep.load_hf(path, spec, dtype=torch.bfloat16)
    {'w': tensor([1., 1.], dtype=torch.bfloat16)}
    """
    leaves = _spec_leaves("load_hf", spec)
    shapes = {leaf.name: tuple(leaf.shape) for leaf in leaves.values()}
    same = {name: path for name, path in (tied or {}).items() if name not in shapes}
    if strict and (unknown := [path for path in same.values() if path not in leaves]):
        raise WeightsError(f"load_hf: tied names {listed(unknown)}, spec has no such leaf; it has {listed(list(leaves))}")
    with contextlib.ExitStack() as stack:
        source = HFFolder(Path(folder), stack)
        source.check(shapes, others=same, ignore=ignore, strict=strict)
        for name, path in same.items():
            if name in source.files and path in leaves:
                source.check_equal(name, leaves[path].name)

        def read(leaf: HFTensor) -> Tensor:
            x = source.read(leaf.name)
            # A copy always: what the file gives is a view of the file.
            return x.to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype, copy=True)

        return tree_map(read, spec)


def stream_hf(params: Any, spec: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, tensor)`` for each leaf of ``params``, in their order; nothing for what is tied.

    The tensors are the params' own, detached and not copied. Raises `WeightsError` at once if ``params`` lacks a leaf
    of ``spec``, has one more, or has one of another shape.

    >>> import torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,)), "head": fstep.Tied("w")}
    >>> list(fstep.stream_hf({"w": torch.ones(2), "head": fstep.Tied("w")}, spec))
    [('linear.weight', tensor([1., 1.]))]
    """
    leaves = _spec_leaves("stream_hf", spec)
    values = dict(zip(tree_paths(params), tree_leaves(params), strict=True))
    missing, extra = [p for p in leaves if p not in values], [p for p in values if p not in leaves]
    if missing or extra:
        raise WeightsError(
            "stream_hf: "
            + (f"params have no leaf {listed(missing)}, which spec has; " if missing else "")
            + (f"spec has no leaf {listed(extra)}, which params have; " if extra else "")
            + "make spec with the config of these params, and merge adapters and gather shards first"
        )
    for path, leaf in leaves.items():
        if tuple(values[path].shape) != tuple(leaf.shape):
            raise WeightsError(
                f"stream_hf: params leaf {path!r} has the shape {tuple(values[path].shape)}, spec says "
                f"{tuple(leaf.shape)} for {leaf.name!r}; make spec with the config of these params"
            )
    return ((leaf.name, values[path].detach()) for path, leaf in leaves.items())


def save_hf(
    folder: str | os.PathLike[str],
    params: Any,
    spec: Any,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write ``params`` as a Hugging Face folder that ``from_pretrained`` loads, whole or not at all; return its path.

    Args:
        folder: made anew. One that holds a model is replaced, with everything in it; any other is refused.
        params: the tree to write, on any device; one tensor at a time is copied to the host.
        spec: a tree of `HFTensor` and `Tied` of the same structure.
        config: written as ``config.json``. Its ``"dtype"`` is what ``from_pretrained`` converts to.
        dtype: what floating-point tensors are converted to; by default each keeps its own.
        max_shard_bytes: start another file when one would grow beyond this.
        extra_files: files to copy into the folder, such as those of the tokenizer.

    Raises `WeightsError` if params and spec differ, or if the folder may not be replaced.

    >>> import os, tempfile, torch, fstep
    >>> spec = {"w": fstep.HFTensor("linear.weight", (2,))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_hf(f"{folder}/model", {"w": torch.ones(2)}, spec, config={"model_type": "mine"})
    ...     sorted(os.listdir(path))
    ['config.json', 'model.safetensors']
    """
    tensors = stream_hf(params, spec)
    plan = {}
    for name, x in stream_hf(params, spec):
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        if kind not in DTYPES or x.is_meta:
            raise WeightsError(f"save_hf: {name!r} is {kind} on {x.device}, which no file can hold; pass dtype=, or values")
        plan[name] = (kind, tuple(x.shape))
    sizes = {name: kind.itemsize * torch.Size(shape).numel() for name, (kind, shape) in plan.items()}
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
    final = Path(folder).resolve()
    _check_replaceable(final)
    with whole_folder(final) as new:
        for shard, group in zip(shards, groups, strict=True):
            part = ((name, x.to(plan[name][0])) for name, x in itertools.islice(tensors, len(group)))
            write_safetensors(new / shard, {name: plan[name] for name in group}, part)
        if shards != [SINGLE]:
            weight_map = {name: shard for shard, group in zip(shards, groups, strict=True) for name in group}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if settings is not None:
            (new / CONFIG).write_text(settings)
        for file in map(Path, extra_files):
            shutil.copyfile(file, new / file.name)
    return Path(folder)


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


def _spec_leaves(who: str, spec: Any) -> dict[str, HFTensor]:
    leaves = dict(zip(tree_paths(spec), tree_leaves(spec), strict=True))
    paths: dict[str, str] = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, HFTensor):
            raise WeightsError(f"{who}: spec has a {type(leaf).__name__} at {path!r}; make it an HFTensor(name, shape)")
        if leaf.name in paths:
            first = paths[leaf.name]
            raise WeightsError(f"{who}: spec has {leaf.name!r} at {first!r} and {path!r}; put Tied({first!r}) at {path!r}")
        paths[leaf.name] = path
    return leaves
