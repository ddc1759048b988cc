"""How ranks agree: rank 0 hears what everybody has to say, decides, and tells each. An error anywhere is everybody's.

rank 0   ask ◄──┬───◄─┐  decide  ─┬──►──┐
rank 1   ask ───┘     │           ┘     │
rank 2   ask ─────────┘                 ┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fstep.mesh.axis import ORDER, Axis, Mesh
from fstep.mesh.exchange import transport
from fstep.mesh.launch import count_ranks
from fstep.mesh.transport import MeshError
from fstep.tree import check_type

Q = TypeVar("Q")
A = TypeVar("A")


def given_mesh(who: str, mesh: Mesh | None, *, error: type[Exception]) -> Mesh:
    """Return the mesh, `Mesh()` where none was given; but where there are other ranks, somebody has forgotten to give it.

    Each would then write its own part, as if that were all, over those of the others.
    """
    if mesh is not None:
        return mesh
    if (ranks := count_ranks()) > 1:
        raise error(
            f"{who}: mesh is not given, and the program runs on {ranks} ranks; call it on all of them with mesh=mesh (or, "
            "for what this rank has and nothing else, with mesh=Mesh())"
        )
    return Mesh()


def all_ranks(who: str, mesh: Mesh) -> Axis:
    """Return the axis of all ranks of a mesh."""
    check_type(who, "mesh", mesh, Mesh, "Mesh(), or the mesh whose ranks call this")
    return mesh.over(*ORDER)


def consult(
    who: str,
    axis: Axis,
    ask: Callable[[], Q],
    decide: Callable[[list[Q]], Sequence[A]],
    *,
    error: type[Exception],
) -> A:
    """Return to each rank its answer: ``decide([ask() of rank 0, ask() of rank 1, ...])[rank]``, decided by rank 0.

    Collective. What is asked and answered travels as notes, past the device. If ``ask`` raises on a rank, or ``decide``
    does, every rank raises an ``error`` with that message, ended by the rank; on one rank alone it is raised as it is.
    """
    if axis.size == 1:
        return decide([ask()])[0]
    lines = transport(who, axis)
    failure: Exception | None = None
    try:
        mine: tuple[str, Q | None] = "", ask()
    except MeshError:  # nobody would hear of it
        raise
    except Exception as caught:
        failure, mine = caught, (f"{_text(who, caught, error)} (on rank {axis.ranks[axis.rank]})", None)
    answer: A
    if axis.rank:
        lines.send_note(mine, 0, channel="forward").wait()
        message, answer = lines.recv_note(0, channel="forward").wait()
    else:
        heard: list[Any] = [mine, *(lines.recv_note(rank, channel="forward").wait() for rank in range(1, axis.size))]
        message = next((text for text, _ in heard if text), "")
        answers: Sequence[Any] = [None] * axis.size
        if not message:
            try:
                answers = decide([asked for _, asked in heard])
            except Exception as caught:
                failure, message = caught, _text(who, caught, error)
        for told in [lines.send_note((message, answers[rank]), rank, channel="forward") for rank in range(1, axis.size)]:
            told.wait()
        answer = answers[0]
    if message:
        raise error(message) from failure
    return answer


def _text(who: str, caught: Exception, error: type[Exception]) -> str:
    return str(caught) if isinstance(caught, error) else f"{who}: {type(caught).__name__}: {caught}"
