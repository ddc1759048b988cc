"""Checkpoints: a state on disk, bit for bit, or an error. Saved on one mesh, it loads on any other.

    runs/
      step-00000100/
        manifest.json                         every leaf and where its parts are; every file: size, header's checksum
        tensors-00000.safetensors             the leaves, under their paths, about 1 GiB a file
      step-00000200/                          the same, saved by the ranks of a mesh:
        manifest.json
        tensors-rank00000-00000.safetensors   what rank 0 wrote
        tensors-rank00001-00000.safetensors   what rank 1 wrote
      .tmp-new-step-00000300/                 being written, or left by a killed run; never read, removed by the next save

A folder named ``step-*`` was complete and on the disk before it got its name. Each block of a tensor, each file's header
and the manifest carry a CRC-32, which loading checks. Nothing is pickled, so loading runs no code.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fstep.mesh.axis import Mesh
from fstep.state import files
from fstep.state.agree import all_ranks, consult, given_mesh
from fstep.state.folders import discard, filling, settle, sync, whole_folder
from fstep.state.manifest import (
    STEP,
    CheckpointError,
    Leaf,
    Manifest,
    check_fit,
    complete,
    find,
    misfit,
    read_manifest,
    write_manifest,
)
from fstep.state.offers import Offer, Share, assign, offers
from fstep.state.reading import read_leaves
from fstep.tree import tree_leaves, tree_replace_leaves

__all__ = ["CheckpointError", "latest_step", "load_checkpoint", "save_checkpoint"]

_GROUP_BYTES = 1 << 30
_WORKERS = min(8, os.cpu_count() or 1)


def save_checkpoint(
    folder: str | os.PathLike[str],
    state: Any,
    *,
    mesh: Mesh | None = None,
    keep: int | None = None,
    step: int | None = None,
) -> Path:
    """Write ``state`` to ``folder/step-00000123``, whole or not at all, and return that path.

    On a mesh every rank calls this with its own state, and writes files of its own. What several ranks hold is written by
    one of them, by turns, so that data-parallel ranks share the work; what nobody holds is an error.

    Args:
        folder: where the run keeps its checkpoints, on a file system that all ranks see; made if it does not exist. One
            run writes to it at a time.
        state: any tree of tensors, on any device: shards over any axis, or replicated. Leaves may be views,
            non-contiguous or share storage.
        mesh: the mesh whose ranks call this. It may be left out in a program that runs on one rank; ``Mesh()`` saves what
            this rank has as if it were all.
        keep: after the new checkpoint has landed, delete all but it and the ``keep - 1`` latest others.
        step: the number to file it under; by default ``state.step``.

    A checkpoint of the same step is replaced. A process killed at any moment leaves every complete checkpoint loadable,
    and at most a folder named ``.tmp-*`` that the next save removes. Host memory holds a few tensors at a time.

    Raises `CheckpointError` for a leaf that is no tensor or has a dtype the format lacks, for ranks whose states do not fit
    together, for a bad ``keep``, and without ``mesh`` where there are several ranks. An error on one rank is raised on all
    of them; `MeshError` if a rank is gone.

    >>> import tempfile, torch, fstep
    >>> state = fstep.init_state({"w": torch.ones(2)}, fstep.sgd)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fstep.save_checkpoint(folder, state).name
    'step-00000000'
    """
    who = "save_checkpoint"
    mesh = given_mesh(who, mesh, error=CheckpointError)
    everyone = all_ranks(who, mesh)
    leaves: dict[str, Tensor] = {}

    def offer() -> tuple[int, dict[str, Offer]]:
        number = _check_arguments(state, keep, step)
        found = offers(who, "state", state, error=CheckpointError)
        leaves.update(zip(found, tree_leaves(state), strict=True))
        _check_values(leaves)
        _wait_for_devices(leaves)
        return number, found

    with contextlib.ExitStack() as landing:  # of rank 0: left with an error, it removes what was written

        def plan(heard: list[tuple[int, dict[str, Offer]]]) -> list[tuple[Path, dict[str, Share]]]:
            steps = [number for number, _ in heard]
            if len(set(steps)) > 1:
                raise CheckpointError(f"{who}: the ranks save steps {steps}; call it on all ranks after the same step")
            shares = assign(who, [found for _, found in heard], error=CheckpointError)
            settle(Path(folder), STEP)
            final = Path(folder) / f"step-{steps[0]:08d}"
            landing.enter_context(whole_folder(final))
            own: list[dict[str, Share]] = [{} for _ in heard]
            for path, share in shares.items():
                for rank in {0, *(rank for rank, _ in share.parts)}:
                    own[rank][path] = share
            return [(final, part) for part in own]

        final, shares = consult(who, everyone, offer, plan, error=CheckpointError)

        def write() -> list[tuple[str, files.Written, list[str]]]:
            mine = {path: leaves[path] for path, share in shares.items() if any(r == everyone.rank for r, _ in share.parts)}
            return _write(filling(final), mesh, mine)

        def land(heard: list[list[tuple[str, files.Written, list[str]]]]) -> Sequence[None]:
            written = {name: done for own in heard for name, done, _ in own}
            holds = {(rank, path): name for rank, own in enumerate(heard) for name, _, paths in own for path in paths}
            saved = {
                path: Leaf(share.dtype, share.shape, tuple((holds[rank, path], part) for rank, part in share.parts))
                for path, share in shares.items()
            }
            write_manifest(filling(final), Manifest(int(final.name.removeprefix("step-")), written, saved))
            landing.close()
            if keep is not None:
                _drop_old(final, keep)
            return [None] * len(heard)

        consult(who, everyone, write, land, error=CheckpointError)
    return final


def load_checkpoint(
    folder: str | os.PathLike[str],
    like: Any,
    *,
    mesh: Mesh = Mesh(),  # noqa: B008
    step: int | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Return the state saved in ``folder``, bit for bit, in the structure of ``like``.

    The mesh it was saved on does not matter. Of a leaf that is a part of a parameter that part is read: the blocks of at
    most 256 KiB that its elements are in, and nothing else.

    Args:
        folder: the folder given to `save_checkpoint`, on a file system that all ranks see.
        like: a tree of the same structure, dtypes and shapes, such as a freshly made state; its values are not read,
            so its tensors may be on the meta device. On a mesh it is this rank's: its `Shard`, `Copied`, `Stages` and ZeRO
            nodes say what to read, and are in the result.
        mesh: the mesh whose ranks call this. Together they have to hold what was saved.
        step: which checkpoint; by default the latest complete one.
        device: where the tensors go; by default where those of ``like`` are, with the CPU in place of meta.

    Raises `CheckpointError` if there is none, if a byte that was read differs from what was saved (naming file and
    tensor), or if paths, whole shapes or dtypes are not those of ``like``: a leaf that is ``None`` in one of the two is such
    a difference. An error on one rank is raised on all of them; `MeshError` if a rank is gone.

    >>> import tempfile, torch, fstep
    >>> state = fstep.init_state({"w": torch.ones(2)}, fstep.sgd)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = fstep.save_checkpoint(folder, state)
    ...     fstep.load_checkpoint(folder, like=state).params
    {'w': tensor([1., 1.])}
    >>> with tempfile.TemporaryDirectory() as folder:  # from two ranks to one
    ...     cut = lambda mesh: {"w": fstep.Shard.cut(torch.arange(4), axis=mesh.tp, dim=0)}
    ...     paths = fstep.simulate(lambda mesh: fstep.save_checkpoint(folder, cut(mesh), mesh=mesh, step=0), tp=2)
    ...     fstep.load_checkpoint(folder, like={"w": torch.arange(4)})
    {'w': tensor([0, 1, 2, 3])}
    """
    who = "load_checkpoint"
    everyone = all_ranks(who, mesh)
    wanted: dict[str, Offer] = {}

    def look(heard: list[None]) -> list[Path]:
        return [find(Path(folder), step)] * len(heard)  # once: what is the latest may change while the ranks look

    ask = functools.partial(offers, who, "like", like, error=CheckpointError)
    found = consult(who, everyone, lambda: wanted.update(ask()), look, error=CheckpointError)
    manifests: list[Manifest] = []

    def fit() -> set[str]:
        manifests.append(read_manifest(found))
        return set(check_fit(found, manifests[0].leaves, {path: (o.dtype, o.shape) for path, o in wanted.items()}))

    def compare(heard: list[set[str]]) -> Sequence[None]:
        if lacking := set.intersection(*heard):
            names = [path for path in manifests[0].leaves if path in lacking]
            raise misfit(found, "the checkpoint", "like", names, mesh.size)
        return [None] * len(heard)

    consult(who, everyone, fit, compare, error=CheckpointError)

    def home(x: Tensor) -> torch.device:
        return torch.device(device) if device is not None else torch.device("cpu") if x.is_meta else x.device

    targets = {path: (o.part, home(x)) for (path, o), x in zip(wanted.items(), tree_leaves(like), strict=True)}
    loaded: list[Tensor] = []

    def read() -> None:
        loaded.extend(read_leaves(found, manifests[0], targets, workers=_WORKERS))

    consult(who, everyone, read, lambda heard: heard, error=CheckpointError)
    return tree_replace_leaves(like, loaded)


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """Return the number of the latest complete checkpoint in ``folder``, or ``None`` if it holds none.

    >>> import fstep
    >>> fstep.latest_step("no/such/folder") is None
    True
    """
    return max(complete(Path(folder)), default=None)


def _write(folder: Path, mesh: Mesh, leaves: Mapping[str, Tensor]) -> list[tuple[str, files.Written, list[str]]]:
    """Write leaves into files of this rank; return for each file its name, what was written and the paths in it."""
    prefix = "tensors" if mesh.size == 1 else f"tensors-rank{mesh.rank:05d}"
    groups = files.group_by_size({path: x.nbytes for path, x in leaves.items()}, _GROUP_BYTES)

    def write(number: int) -> tuple[str, files.Written, list[str]]:
        name, group = f"{prefix}-{number:05d}.safetensors", {path: leaves[path] for path in groups[number]}
        written = files.write_safetensors(folder / name, {p: (x.dtype, x.shape) for p, x in group.items()}, group.items())
        if mesh.rank:  # rank 0 syncs the folder, but cannot wait for what another host has written
            sync(folder / name)
        return name, written, groups[number]

    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(write, range(len(groups))))


def _drop_old(final: Path, keep: int) -> None:
    others = {number: path for number, path in complete(final.parent).items() if path.name != final.name}
    for number in sorted(others)[: max(0, len(others) - (keep - 1))]:
        discard(others[number])


def _check_arguments(state: Any, keep: int | None, step: int | None) -> int:
    """Return the step to save under."""
    who = "save_checkpoint"
    if keep is not None and keep < 1:
        raise CheckpointError(f"{who}: keep={keep} would delete what was just saved; pass 1 or more, or None for all")
    if step is None:
        if not isinstance(getattr(state, "step", None), int | Tensor):
            raise CheckpointError(f"{who}: {type(state).__name__} has no .step to name the checkpoint by; pass step=")
        step = int(state.step)
    if step < 0:
        raise CheckpointError(f"{who}: step={step} is negative; pass the number of steps taken")
    return step


def _check_values(leaves: Mapping[str, Tensor]) -> None:
    for path, x in leaves.items():
        if x.is_meta or x.layout is not torch.strided or x.dtype not in files.DTYPES:
            raise CheckpointError(
                f"save_checkpoint: leaf {path!r} is a {x.dtype} tensor ({x.layout}, on {x.device}), which a checkpoint "
                f"cannot hold; store dense values of one of {sorted(files.DTYPES.values())}"
            )


def _wait_for_devices(leaves: Mapping[str, Tensor]) -> None:
    # Files are written by other threads, whose streams do not wait for work queued on the caller's.
    for device in {x.device for x in leaves.values() if x.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
