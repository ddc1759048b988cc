"""`simulate`: every rank of a mesh in this process, each a thread.

    simulate(fn, dp=2, tp=2)     fn(mesh) of rank 0   ─┐
                                 fn(mesh) of rank 1    ├─  [result 0, result 1, result 2, result 3]
                                 fn(mesh) of rank 2    │
                                 fn(mesh) of rank 3   ─┘

The function cannot tell: it is handed the same kind of mesh that `mesh_from_env` makes from processes. A step that works
here with eight ranks is the one to start under torchrun.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from fstep.mesh.axis import Mesh, check_sizes, describe, make_mesh
from fstep.mesh.threads import World
from fstep.mesh.transport import MeshError

T = TypeVar("T")


def simulate(
    fn: Callable[[Mesh], T],
    *,
    dp: int = 1,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
    timeout: float | None = None,
) -> list[T]:
    """Run ``fn(mesh)`` once per rank, each in a thread of this process, and return the results in the order of ranks.

    Ranks count ``tp`` fastest, then cp, ep, dp, and pp slowest; ``mesh.rank`` is a rank's place in the list. One rank runs
    at a time and hands on where it has to wait, so that a run is the same every time, down to the bits. Each thread has
    the caller's grad mode, inference mode and device.

    If a rank raises, that error is raised here, with a note of which rank it was, and the others are released. Raises
    `MeshError` if no rank can go on (the message says who waits for whom, in which action over which axis, at which line),
    if calls on an axis do not match, or if something was sent that nobody received; ValueError for a size below 1;
    TimeoutError if ranks still compute after ``timeout`` seconds (their threads are left behind).

    >>> import torch, fstep
    >>> fstep.simulate(lambda mesh: fstep.psum(torch.tensor(float(mesh.rank)), axis=mesh.dp), dp=4)
    [tensor(6.), tensor(6.), tensor(6.), tensor(6.)]
    """
    sizes = check_sizes("simulate", dp=dp, pp=pp, cp=cp, tp=tp, ep=ep)
    size = math.prod(sizes.values())
    world = World([describe(sizes, rank) for rank in range(size)])
    results: dict[int, T] = {}
    settings = _settings()

    def run(rank: int) -> None:
        try:
            world.begin(rank)
            with settings():
                results[rank] = fn(make_mesh(sizes, rank, functools.partial(world.transport, rank)))
        except BaseException as error:
            if world.failure is None:
                error.add_note(f"raised by {world.labels[rank]} of simulate")
            world.fail(error, f"{world.labels[rank]} raised {type(error).__name__}: {error}")
        finally:
            world.finish(rank)

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, rank), name=f"simulate {rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    try:
        world.hand_on()
        if not world.done.wait(timeout):
            raise TimeoutError(f"simulate: not done after {timeout} seconds\n{world.report()}")
    except BaseException as error:
        # Whoever still runs stops at its next action.
        world.fail(error, f"simulate was left by {type(error).__name__}")
        raise
    for thread in threads:
        thread.join()
    try:
        if world.failure is not None:
            raise world.failure
        if found := world.leftovers():
            raise MeshError("simulate: every rank has returned, and\n" + "\n".join(found))
        return [results[rank] for rank in range(size)]
    finally:
        # The error's traceback holds this frame; what the frame holds would live as long as the error.
        world.failure = None
        results.clear()


def _settings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Take the caller's thread-local settings of torch along into another thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.get_default_device()
    casts = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def apply() -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            # The backward pass of GPU tensors would run in one thread for all ranks, and the first to wait stop it.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for kind, dtype in casts.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if device.type != "cpu":  # a default device costs time in every operation
                stack.enter_context(device)
            if gpu is not None:
                torch.cuda.set_device(gpu)
            yield

    return apply
