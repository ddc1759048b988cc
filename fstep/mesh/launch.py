"""`mesh_from_env`: the mesh of a program that torchrun started, one rank a process.

    torchrun --nproc-per-node 4 train.py        train.py:  with fstep.mesh_from_env(pp=2) as mesh: ...

    process   0      1      2      3            pp is asked for, dp follows from the number of processes
              pp 0   pp 0   pp 1   pp 1
              dp 0   dp 1   dp 0   dp 1

Started without torchrun, the program is one process and the mesh is `Mesh()`.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator

import torch

from fstep.mesh.axis import Mesh, check_sizes, describe, make_mesh
from fstep.mesh.processes import Processes
from fstep.mesh.turns import ranks_simulated
from fstep.mesh.wire import Seat, explain


@contextlib.contextmanager
def mesh_from_env(
    *,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
    dp: int | None = None,
    backend: str | None = None,
    timeout: float = 600.0,
) -> Iterator[Mesh]:
    """Join the processes that torchrun started, as one rank of a mesh, for the length of a ``with`` block.

    ``dp`` is what remains: the number of processes over ``pp * cp * tp * ep``. ``backend`` is ``"nccl"`` or ``"gloo"``; by
    default NCCL if every process of this host has a GPU of its own, which becomes its current device, and gloo on the
    CPU otherwise. An already initialized torch.distributed is used and left as it is. At the end of the block all ranks
    wait for each other and the process groups are destroyed.

    Raises ValueError for sizes that do not multiply to the number of processes, or an unknown backend; inside the block,
    functions that communicate raise `MeshError`, which names the axis and the action, when a rank is gone or does not come
    within ``timeout`` seconds. (NCCL runs ahead of the program: its watchdog ends the process and names the axis.)

    >>> import fstep
    >>> with fstep.mesh_from_env() as mesh:  # not under torchrun
    ...     print(mesh.draw())
    1 rank
    """
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f'mesh_from_env: backend is {backend!r}; pass "nccl", "gloo", or None to choose')
    import torch.distributed as dist

    mine = not dist.is_initialized()
    size = int(os.environ.get("WORLD_SIZE", "1")) if mine else dist.get_world_size()
    sizes = derive_sizes(size, dp=dp, pp=pp, cp=cp, tp=tp, ep=ep)
    if size == 1:
        yield Mesh()
        return
    there = None if mine else dist.get_backend()
    chosen = backend or (there if there in ("nccl", "gloo") else _default_backend())
    world = _join(chosen, timeout, sizes, mine)
    try:
        yield make_mesh(sizes, world.seat.rank, world.transport)
        with explain("leaving the mesh", world.seat, range(size)):
            # Whoever left early would take the meeting point of the others along.
            dist.barrier(device_ids=[torch.cuda.current_device()] if chosen == "nccl" else None)
    except BaseException:
        # NCCL would wait for others before it lets go; this process ends with its error instead.
        if chosen != "nccl":
            _leave(world, mine)
        raise
    _leave(world, mine)


def count_ranks() -> int:
    """Return how many ranks this program runs on, whatever mesh its functions are handed.

    Those of the `simulate` call that this is inside of; otherwise the processes of torch.distributed or, where it is not
    initialized, those that torchrun has started.

    >>> import fstep
    >>> from fstep.mesh.launch import count_ranks
    >>> count_ranks(), fstep.simulate(lambda mesh: count_ranks(), dp=2)
    (1, [2, 2])
    """
    import torch.distributed as dist

    if (simulated := ranks_simulated.get()) > 1:
        return simulated
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def derive_sizes(processes: int, *, dp: int | None, **sizes: int) -> dict[str, int]:
    """Return the size of every axis, ``dp`` being what remains."""
    check_sizes("mesh_from_env", dp=1 if dp is None else dp, **sizes)
    product = math.prod(sizes.values())
    asked = {name: size for name, size in sizes.items() if size > 1}
    if dp is None:
        if processes % product:
            raise ValueError(
                f"mesh_from_env: {_times(asked)} = {product} does not divide {_count(processes)}; start a multiple of "
                f"{product}, as with torchrun --nproc-per-node {product}"
            )
        dp = processes // product
    elif dp * product != processes:
        raise ValueError(
            f"mesh_from_env: {_times({'dp': dp, **asked})} = {dp * product}, and there are {_count(processes)}; leave dp "
            f"out, or start {dp * product}, as with torchrun --nproc-per-node {dp * product}"
        )
    return check_sizes("mesh_from_env", dp=dp, **sizes)


def _times(sizes: dict[str, int]) -> str:
    return " * ".join(f"{name} {size}" for name, size in sizes.items())


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def _default_backend() -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "gloo"


def _join(backend: str, timeout: float, sizes: dict[str, int], mine: bool) -> Processes:
    import torch.distributed as dist

    if mine:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    size = math.prod(sizes.values())
    here = Seat(dist.get_rank(), backend, timeout, [describe(sizes, rank) for rank in range(size)])
    return Processes(here, keep=not mine)


def _leave(world: Processes, mine: bool) -> None:
    import torch.distributed as dist

    world.close()
    if mine:
        dist.destroy_process_group()
