"""Simulated ranks take turns: threads of which one runs at a time, and hands on when it has to wait.

    rank 0   ███ waits ·················███ returns
    rank 1            ███ waits ········           ███
    rank 2                     ███ wakes both ███

Only the rank whose turn it is touches anything here, so there are no locks; a run takes the same turns every time, and
if whoever has to wait finds nobody to hand on to, nobody ever can: a deadlock is seen when it happens, not timed out.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from fstep.mesh.transport import MeshError

# Frames of these are not where the user waits.
PACKAGE = os.path.dirname(os.path.dirname(__file__))
LIBRARIES = (
    PACKAGE + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
    threading.__file__,
    os.path.dirname(futures.__file__) + os.sep,
)

# How many ranks the `simulate` call has that this thread, or the one that started it with its context, is a rank of.
ranks_simulated: ContextVar[int] = ContextVar("ranks_simulated", default=1)


@dataclass
class Wait:
    """What a rank waits for: ``token`` is what others wake it by, ``missing`` says at the time of asking for whom."""

    token: Any
    text: str
    missing: Callable[[], list[int]]


class Turns:
    """The ranks of one `simulate` call: whose turn it is, who waits for what, who is done."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self.turns = [threading.Semaphore(0) for _ in labels]
        self.ready = deque(range(len(labels)))
        self.waiting: dict[int, Wait] = {}
        self.threads: dict[int, int] = {}
        self.returned: set[int] = set()
        self.failure: BaseException | None = None
        self.reason = ""
        self.done = threading.Event()

    def begin(self, rank: int) -> None:
        """Wait for the first turn."""
        self.threads[rank] = threading.get_ident()
        ranks_simulated.set(len(self.labels))  # in this thread's own copy of the context
        self.turns[rank].acquire()
        self.check()

    def block(self, rank: int, wait: Wait) -> None:
        """Hand on, and come back when someone has called ``wake(wait.token)``."""
        self.check()
        self.waiting[rank] = wait
        self.hand_on()
        self.turns[rank].acquire()
        self.check()

    def wake(self, token: Any) -> None:
        """Let those that wait for ``token`` have a turn again."""
        for rank in [r for r, wait in self.waiting.items() if wait.token == token]:
            del self.waiting[rank]
            self.ready.append(rank)

    def hand_on(self) -> None:
        """Give the turn to the next rank; if none can go on, to all, so that each raises."""
        if self.waiting and not self.ready and self.failure is None:
            self.fail(MeshError(f"simulate: no rank can go on\n{self.report()}"), "")
        if self.failure is not None:
            self.ready.extend(self.waiting)
            self.waiting.clear()
        if self.ready:
            self.turns[self.ready.popleft()].release()
        else:
            self.done.set()

    def fail(self, error: BaseException, reason: str) -> None:
        """Keep the first error, which is the one that `simulate` raises."""
        if self.failure is None:
            self.failure, self.reason = error, reason or str(error)

    def finish(self, rank: int) -> None:
        """Give the last turn away."""
        self.returned.add(rank)
        self.hand_on()

    def check(self) -> None:
        """Raise in a rank that others have left alone."""
        if self.failure is not None:
            raise MeshError(self.reason)
        if self.done.is_set():
            raise MeshError("this mesh belongs to a call of simulate that has returned; use it inside the function only")

    def report(self) -> str:
        """Say for each rank what it is doing."""
        lines = []
        for rank, label in enumerate(self.labels):
            if rank in self.returned:
                lines.append(f"  {label} has returned")
                continue
            at = _place(self.threads.get(rank))
            if (wait := self.waiting.get(rank)) is not None:
                whom = ", ".join(self.labels[r] for r in wait.missing())
                lines.append(f"  {label} is in {wait.text}, waiting for {whom}{at}")
            else:
                lines.append(f"  {label} is computing{at}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Call:
    """A `Pending` that waits for ``token``, unless ``ready()`` already, and then takes its result."""

    turns: Turns
    rank: int
    waiting: Wait
    ready: Callable[[], bool]
    take: Callable[[], Any]

    def wait(self) -> Any:
        """Wait, and take it."""
        if not self.ready():
            self.turns.block(self.rank, self.waiting)
        return self.take()


def _place(thread: int | None) -> str:
    """Say where in the user's code a thread is."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return f", at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""
