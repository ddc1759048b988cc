"""`simulate`: results in the order of ranks, errors of the rank's own, deadlocks that are seen, nothing left behind."""

from __future__ import annotations

import contextvars
import gc
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fstep
from fstep import Axis, Mesh, MeshError
from fstep.mesh.launch import count_ranks
from fstep.mesh.transport import Transport


def psum(axis: Axis, x: Any = 1.0) -> torch.Tensor:
    return fstep.psum(torch.as_tensor(x), axis=axis)


def talk(axis: Axis) -> Transport:
    assert axis.transport is not None
    return axis.transport


# Order, settings, leaks ----------------------------------------------------------------------------------------------


def test_order_of_ranks() -> None:
    where = fstep.simulate(
        lambda m: (m.rank, m.size, m.pp.rank, m.dp.rank, m.ep.rank, m.cp.rank, m.tp.rank), pp=2, dp=2, ep=2, cp=2, tp=2
    )
    assert where == [(r, 32, r // 16, r // 8 % 2, r // 4 % 2, r // 2 % 2, r % 2) for r in range(32)]


def test_ranks_of_an_axis() -> None:
    mesh = fstep.simulate(lambda mesh: mesh, pp=2, dp=3, tp=2)[9]  # pp 1, dp 1, tp 1
    assert (mesh.pp.ranks, mesh.dp.ranks, mesh.tp.ranks, mesh.cp.ranks) == ((3, 9), (7, 9, 11), (8, 9), (9,))
    assert (mesh.pp.rank, mesh.dp.rank, mesh.tp.rank) == (1, 1, 1)


def test_one_rank() -> None:
    assert fstep.simulate(lambda mesh: mesh == Mesh()) == [True]


@pytest.mark.parametrize("grad", [True, False])
def test_threads_have_the_callers_settings(grad: bool) -> None:
    torch.set_num_threads(1)
    with torch.set_grad_enabled(grad):
        got = fstep.simulate(lambda mesh: (torch.is_grad_enabled(), torch.get_num_threads()), dp=2)
    assert got == [(grad, 1)] * 2
    with torch.inference_mode():
        assert fstep.simulate(lambda mesh: torch.is_inference_mode_enabled(), dp=2) == [True, True]
    with torch.device("meta"):
        assert fstep.simulate(lambda mesh: torch.ones(1).device.type, dp=2) == ["meta", "meta"]


def test_a_backward_pass_runs_in_its_ranks_thread() -> None:
    """On GPU tensors torch would use one thread for all ranks, and the first to wait there would stop the others."""
    assert fstep.simulate(lambda mesh: torch._C._is_multithreading_enabled(), dp=2) == [False, False]
    assert torch._C._is_multithreading_enabled()


class Watched(TorchDispatchMode):
    """Lists the operations of its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


EXCHANGES: dict[str, Callable[[Axis, torch.Tensor], Any]] = {
    "psum": lambda axis, x: fstep.psum(x, axis=axis),
    "pmax": lambda axis, x: fstep.pmax(x, axis=axis),
    "all_gather": lambda axis, x: fstep.all_gather(x, axis=axis, grad="sum"),
    "reduce_scatter": lambda axis, x: fstep.reduce_scatter(x, axis=axis),
    "all_to_all": lambda axis, x: fstep.all_to_all(x, axis=axis, split_dim=0, concat_dim=1),
    "ppermute": lambda axis, x: fstep.ppermute(x, 1, axis=axis),
    "broadcast": lambda axis, x: fstep.broadcast(x, axis=axis, src=1, grad="sum"),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_what_a_rank_does_is_not_another_ranks(name: str) -> None:
    """The last to arrive has done no more than the others: whoever it is, a count of operations is the rank's own."""

    def f(mesh: Mesh) -> list[str]:
        x = torch.ones(3, 2)
        with Watched() as watched:
            EXCHANGES[name](mesh.dp, x)
        return watched.ops

    first, *others = fstep.simulate(f, dp=3)
    assert first and all(ops == first for ops in others)


def test_an_exchange_in_no_ranks_thread_raises_in_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("fstep.mesh.threads.combine", full)
    with pytest.raises(MemoryError, match="no room") as caught:
        fstep.simulate(lambda mesh: psum(mesh.dp), dp=2)
    assert caught.value.__notes__ == ["raised by rank 1 (dp 1) of simulate"]


def test_fifty_ranks_leave_nothing_behind() -> None:
    threads, refs = set(threading.enumerate()), []

    def f(mesh: Mesh) -> float:
        x = torch.ones(1000, requires_grad=True)
        refs.append(weakref.ref(x))
        refs.append(weakref.ref(mesh))
        y = fstep.all_gather(x, axis=mesh.dp, grad="sum")
        refs.append(weakref.ref(y))
        return float(torch.autograd.grad(y.square().sum(), x)[0][0])

    gc.collect()
    gc.disable()  # freed because nobody refers to it, not because the collector came by
    try:
        assert fstep.simulate(f, dp=50) == [100.0] * 50
        assert set(threading.enumerate()) == threads
        assert len(refs) == 150 and not [r for r in refs if r() is not None]
    finally:
        gc.enable()


def test_a_failure_leaves_nothing_behind() -> None:
    threads, refs = set(threading.enumerate()), []

    def f(mesh: Mesh) -> None:
        x = torch.ones(1000) * mesh.rank
        refs.append(weakref.ref(x))
        fstep.psum(x, axis=mesh.dp)
        if mesh.rank == 3:
            raise KeyError("x")
        fstep.psum(x, axis=mesh.dp)

    gc.collect()
    gc.disable()
    try:
        fstep.simulate(f, dp=4)
    except KeyError:
        assert refs[3]() is not None  # in the frame that the traceback shows
    finally:
        left = [r for r in refs if r() is not None]
        gc.enable()
    assert set(threading.enumerate()) == threads
    assert len(refs) == 4 and not left


def test_who_asks_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def inside(mesh: Mesh) -> list[Any]:
        found: list[Any] = [count_ranks(), fstep.simulate(lambda mesh: count_ranks(), dp=3)]
        helper = threading.Thread(target=contextvars.copy_context().run, args=(lambda: found.append(count_ranks()),))
        helper.start()
        helper.join()
        return found

    assert count_ranks() == 1 and fstep.simulate(lambda mesh: count_ranks()) == [1]
    assert fstep.simulate(inside, pp=2) == [[2, [3, 3, 3], 2]] * 2
    assert count_ranks() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # started by torchrun, torch.distributed not initialized or left already
    assert count_ranks() == 4 and fstep.simulate(lambda mesh: count_ranks(), dp=2) == [2, 2]


def test_inside_another_simulation() -> None:
    inner = lambda outer: [float(x) for x in fstep.simulate(lambda mesh: psum(mesh.tp, outer.rank), tp=2)]  # noqa: E731
    assert fstep.simulate(lambda mesh: [*inner(mesh), float(psum(mesh.dp))], dp=2) == [[0, 0, 2], [2, 2, 2]]


# Errors of one rank --------------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


@pytest.mark.parametrize("waiting", ["psum", "recv", "send", "nothing"])
@pytest.mark.parametrize("error", [OwnError("this one"), SystemExit(3)])
def test_a_failing_rank_raises_its_own_error(error: BaseException, waiting: str) -> None:
    released = []

    def f(mesh: Mesh) -> None:
        if mesh.rank == 5:
            psum(mesh.tp)
            raise error
        try:
            psum(mesh.tp)
            if waiting == "psum":
                psum(mesh.pp)
                psum(mesh.dp)
            elif waiting == "recv" and mesh.pp.rank == 0:
                talk(mesh.pp).recv(1, (1,), torch.float32, channel="backward").wait()
            elif waiting == "send" and mesh.pp.rank == 0:
                talk(mesh.pp).send(torch.ones(1), 1, channel="forward").wait()
        except MeshError as other:
            released.append(str(other))
            raise

    start = time.monotonic()
    with pytest.raises(type(error)) as info:
        fstep.simulate(f, pp=2, dp=2, tp=2)
    assert info.value is error and error.__notes__[-1] == "raised by rank 5 (pp 1, dp 0, tp 1) of simulate"
    assert time.monotonic() - start < 2
    assert all(text.startswith(f"rank 5 (pp 1, dp 0, tp 1) raised {type(error).__name__}: ") for text in released)
    assert len(released) >= (0 if waiting == "nothing" else 1)


def test_a_swallowed_release_does_not_go_on() -> None:
    went_on = []

    def f(mesh: Mesh) -> None:
        if mesh.rank == 1:
            raise OwnError
        try:
            psum(mesh.dp)
        except MeshError:
            psum(mesh.dp)
            went_on.append(mesh.rank)

    with pytest.raises(OwnError):
        fstep.simulate(f, dp=3)
    assert not went_on


def test_an_error_in_a_backward_pass() -> None:
    def f(mesh: Mesh) -> None:
        x = torch.ones(2, requires_grad=True)
        y = fstep.pvary(x, axis=mesh.dp)
        torch.autograd.grad(y.sum() if mesh.rank else y[:1].sum() * torch.ones(3), x)

    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs") as info:
        fstep.simulate(f, dp=2)
    assert "raised by rank 0 (dp 0)" in info.value.__notes__[-1]


# Deadlocks -----------------------------------------------------------------------------------------------------------


def report(f: Callable[[Mesh], Any], **sizes: int) -> list[str]:
    """Return the lines of the report, line numbers of this file written as the text of the line."""
    source = Path(__file__).read_text("utf-8").splitlines()
    with pytest.raises(MeshError) as info:
        fstep.simulate(f, **sizes)
    shown = lambda m: f"at `{source[int(m[1]) - 1].strip()}`"  # noqa: E731
    return re.sub(r"at test_simulate.py:(\d+)", shown, str(info.value)).splitlines()


def test_deadlock_of_a_missing_call() -> None:
    def f(mesh: Mesh) -> None:
        if mesh.dp.rank == 0 or mesh.tp.rank == 1:
            psum(mesh.dp)

    assert report(f, dp=2, tp=2) == [
        "simulate: no rank can go on",
        "  rank 0 (dp 0, tp 0) is in psum over 'dp', waiting for rank 2 (dp 1, tp 0), "
        "at `return fstep.psum(torch.as_tensor(x), axis=axis)`",
        "  rank 1 (dp 0, tp 1) has returned",
        "  rank 2 (dp 1, tp 0) has returned",
        "  rank 3 (dp 1, tp 1) has returned",
    ]


def test_deadlock_of_opposite_orders() -> None:
    def f(mesh: Mesh) -> None:
        for axis in (mesh.dp, mesh.tp) if mesh.rank in (0, 3) else (mesh.tp, mesh.dp):
            fstep.reduce_scatter(torch.ones(2), axis=axis)

    here = "at `fstep.reduce_scatter(torch.ones(2), axis=axis)`"
    assert report(f, dp=2, tp=2) == [
        "simulate: no rank can go on",
        f"  rank 0 (dp 0, tp 0) is in reduce_scatter over 'dp', waiting for rank 2 (dp 1, tp 0), {here}",
        f"  rank 1 (dp 0, tp 1) is in reduce_scatter over 'tp', waiting for rank 0 (dp 0, tp 0), {here}",
        f"  rank 2 (dp 1, tp 0) is in reduce_scatter over 'tp', waiting for rank 3 (dp 1, tp 1), {here}",
        f"  rank 3 (dp 1, tp 1) is in reduce_scatter over 'dp', waiting for rank 1 (dp 0, tp 1), {here}",
    ]


def test_deadlock_of_messages() -> None:
    def f(mesh: Mesh) -> None:
        if mesh.pp.rank == 0:
            talk(mesh.pp).recv(1, (1,), torch.float32, channel="backward").wait()
        else:
            talk(mesh.pp).send(torch.ones(1), 0, channel="forward").wait()

    assert report(f, pp=2) == [
        "simulate: no rank can go on",
        "  rank 0 (pp 0) is in recv over 'pp' (channel 'backward'), waiting for rank 1 (pp 1), "
        'at `talk(mesh.pp).recv(1, (1,), torch.float32, channel="backward").wait()`',
        "  rank 1 (pp 1) is in send over 'pp' (channel 'forward'), waiting for rank 0 (pp 0), "
        'at `talk(mesh.pp).send(torch.ones(1), 0, channel="forward").wait()`',
    ]


def test_a_send_waits_for_its_receiver() -> None:
    """As it does on gloo and NCCL: two ranks that both wait for their send before they receive wait for ever."""

    def f(mesh: Mesh) -> None:
        talk(mesh.pp).send(torch.ones(1), 1 - mesh.pp.rank, channel="forward").wait()
        talk(mesh.pp).recv(1 - mesh.pp.rank, (1,), torch.float32, channel="forward").wait()

    assert "  rank 1 (pp 1) is in send over 'pp' (channel 'forward'), waiting for rank 0 (pp 0)" in report(f, pp=2)[2]


def test_deadlock_in_a_backward_pass() -> None:
    def f(mesh: Mesh) -> None:
        x = torch.ones(2, requires_grad=True)
        y = fstep.pvary(x, axis=mesh.tp)
        if mesh.rank == 1:
            torch.autograd.grad(y.sum(), x)

    assert report(f, tp=2)[1:] == [
        "  rank 0 (tp 0) has returned",
        "  rank 1 (tp 1) is in gradient of pvary over 'tp', waiting for rank 0 (tp 0), at `torch.autograd.grad(y.sum(), x)`",
    ]


def test_deadlock_beside_ranks_that_finish() -> None:
    def f(mesh: Mesh) -> None:
        if mesh.rank == 3:
            time.sleep(0.2)
        elif mesh.rank == 0:
            psum(mesh.dp)

    lines = report(f, dp=4)
    assert (
        "waiting for rank 1 (dp 1), rank 2 (dp 2), rank 3 (dp 3)" in lines[1] and lines[4] == "  rank 3 (dp 3) has returned"
    )


def test_ranks_that_never_return() -> None:
    stop = threading.Event()

    def f(mesh: Mesh) -> None:
        if mesh.rank == 1:
            stop.wait()
        psum(mesh.dp)

    with pytest.raises(TimeoutError) as info:
        fstep.simulate(f, dp=2, timeout=0.2)
    lines = str(info.value).splitlines()
    assert lines[0] == "simulate: not done after 0.2 seconds"
    assert lines[1].startswith("  rank 0 (dp 0) is in psum over 'dp', waiting for rank 1 (dp 1), at test_simulate.py:")
    assert lines[2].startswith("  rank 1 (dp 1) is computing, at test_simulate.py:")
    left = [t for t in threading.enumerate() if t.name.startswith("simulate")]
    assert len(left) == 2
    stop.set()  # the threads left behind end at their next action
    for thread in left:
        thread.join(2)
        assert not thread.is_alive()


# Calls that do not match ---------------------------------------------------------------------------------------------

SAME = "all ranks of an axis have to make the same calls in the same order"
MISMATCHES: dict[str, tuple[Callable[[Mesh], Any], str]] = {
    "functions": (
        lambda m: psum(m.dp) if m.rank else fstep.all_gather(torch.ones(2), axis=m.dp, grad="slice"),
        "axis 'dp': rank 0 (dp 0) calls all_gather of float32 [2] and rank 1 (dp 1) calls psum of float32 []; " + SAME,
    ),
    "shapes": (
        lambda m: psum(m.dp, [1.0] * (m.rank + 1)),
        "axis 'dp': rank 0 (dp 0) calls psum of float32 [1] and rank 1 (dp 1) calls psum of float32 [2]; " + SAME,
    ),
    "dtypes": (
        lambda m: psum(m.dp, [1.0, 1][m.rank]),
        "axis 'dp': rank 0 (dp 0) calls psum of float32 [] and rank 1 (dp 1) calls psum of int64 []; " + SAME,
    ),
    "sources": (
        lambda m: fstep.broadcast(torch.ones(1), axis=m.dp, src=m.rank, grad="slice"),
        "axis 'dp': rank 0 (dp 0) calls broadcast from 0 of float32 [1] and rank 1 (dp 1) calls broadcast from 1 of float32 "
        "[1]; " + SAME,
    ),
    "permutations": (
        lambda m: fstep.ppermute(torch.ones(1), m.rank, axis=m.dp),
        "axis 'dp': rank 0 (dp 0) calls ppermute to [0, 1] of float32 [1] and rank 1 (dp 1) calls ppermute to [1, 0] of "
        "float32 [1]; " + SAME,
    ),
    "gradients": (
        lambda m: fstep.all_gather(torch.ones(1, requires_grad=m.rank == 0), axis=m.dp, grad="sum"),
        "axis 'dp': rank 0 (dp 0) calls all_gather with gradient of float32 [1] and rank 1 (dp 1) calls all_gather of "
        "float32 [1]; " + SAME,
    ),
    "message's shape": (
        lambda m: (
            talk(m.dp).recv(0, (2, 3), torch.float32, channel="forward").wait()
            if m.rank
            else talk(m.dp).send(torch.ones(3, 2), 1, channel="forward")
        ),
        "recv over 'dp' (channel 'forward'): rank 1 (dp 1) expects float32 [2, 3] and rank 0 (dp 0) sent float32 [3, 2]",
    ),
    "message's dtype": (
        lambda m: (
            talk(m.dp).recv(0, (2,), torch.bfloat16, channel="forward").wait()
            if m.rank
            else talk(m.dp).send(torch.ones(2), 1, channel="forward")
        ),
        "recv over 'dp' (channel 'forward'): rank 1 (dp 1) expects bfloat16 [2] and rank 0 (dp 0) sent float32 [2]",
    ),
    "a note for a tensor": (
        lambda m: (
            talk(m.dp).recv(0, (2,), torch.float32, channel="forward").wait()
            if m.rank
            else talk(m.dp).send_note([2], 1, channel="forward")
        ),
        "recv over 'dp' (channel 'forward'): rank 1 (dp 1) expects float32 [2] and rank 0 (dp 0) sent a note",
    ),
    "a message nobody received": (
        lambda m: [talk(m.dp).send(torch.ones(1), 1, channel="forward") for _ in range(2 - 2 * m.rank)],
        "simulate: every rank has returned, and\n"
        "  rank 0 (dp 0) sent 2 messages to rank 1 (dp 1) over 'dp' (channel 'forward') that were not received",
    ),
    "a send nobody waited for": (
        lambda m: (
            talk(m.dp).recv(0, (1,), torch.float32, channel="forward").wait()
            if m.rank
            else talk(m.dp).send(torch.ones(1), 1, channel="forward")
        ),
        "simulate: every rank has returned, and\n"
        "  rank 0 (dp 0) did not call wait() on 1 messages to rank 1 (dp 1) over 'dp' (channel 'forward')",
    ),
    "a call nobody joined": (
        lambda m: None if m.rank else talk(m.dp).all_gather(torch.ones(1), action="prefetch"),
        "simulate: every rank has returned, and\n  rank 0 (dp 0) started prefetch over 'dp', and rank 1 (dp 1) did not",
    ),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatch(what: str) -> None:
    f, message = MISMATCHES[what]
    with pytest.raises(MeshError) as info:
        fstep.simulate(f, dp=2)
    assert str(info.value) == message


def test_one_empty_rank_may_sum_a_constant() -> None:
    """psum's gradient does not communicate: a rank whose loss depends on nothing takes part."""

    def f(mesh: Mesh) -> tuple[float, float]:
        w = torch.ones((), requires_grad=True)
        loss = psum(mesh.dp, w * 3 if mesh.rank else 0.0 * torch.ones(()))
        return float(loss.detach()), float(torch.autograd.grad(loss, w)[0]) if mesh.rank else 0.0

    assert fstep.simulate(f, dp=2) == [(3.0, 0.0), (3.0, 3.0)]


@pytest.mark.parametrize("what", ["call", "message", "group"])
def test_a_mesh_ends_with_its_simulation(what: str) -> None:
    mesh = fstep.simulate(lambda mesh: mesh, dp=2)[0]
    with pytest.raises(MeshError, match="this mesh belongs to a call of simulate that has returned"):
        if what == "message":
            talk(mesh.dp).send(torch.ones(1), 1, channel="forward")
        else:
            psum(mesh.dp if what == "call" else mesh.over("dp", "cp"))


def test_refuses_sizes() -> None:
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"simulate: tp is {bad!r}; pass a number of ranks, 1 or more"):
            fstep.simulate(lambda mesh: None, tp=bad)


def test_autocast_goes_along() -> None:
    def f(mesh: fstep.Mesh) -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fstep.simulate(f, dp=2) == [torch.bfloat16] * 2
    assert fstep.simulate(f, dp=2) == [torch.float32] * 2
