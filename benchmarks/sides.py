"""Sides of a comparison that may not all be installed, or may fail: what can be run is run, and what is not is said."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from job import Step, relative
from torch import Tensor

Build = Callable[[], tuple[Step, Any]]  # of a step, and of a function that returns its gradients


def pick(asked: str | None, default: Sequence[str], known: Sequence[str], needs: Mapping[str, str]) -> list[str]:
    """Return the sides asked for, in that order, without those whose package is not installed."""
    sides = list(default) if asked is None else asked.split(",")
    if unknown := [side for side in sides if side not in known]:
        raise SystemExit(f"--sides: {', '.join(unknown)} not among {', '.join(known)}")
    for side in [side for side in sides if side in needs and find_spec(needs[side]) is None]:
        print(f"left out: {side}, as {needs[side]} is not installed", flush=True)
        sides.remove(side)
    return sides


class Guarded:
    """Build and run sides so that one that fails takes no other with it.

    ``failed`` says why, ``seen`` has the losses and gradient norms of a side's first ``compared`` steps.
    """

    def __init__(self, compared: int) -> None:
        self.compared = compared
        self.failed: dict[str, str] = {}
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def side(self, name: str, build: Build) -> Callable[[], Callable[[], None]]:
        """Return the builder of a step that never fails."""

        def make() -> Callable[[], None]:
            print(f"building {name}", flush=True)
            held: dict[str, Step] = {}
            self.seen[name] = []
            self._try(name, lambda: held.update(step=build()[0]))

            def once() -> None:
                out = held["step"]()
                if len(self.seen[name]) < self.compared:
                    self.seen[name].append(out)

            def run() -> None:
                if name not in self.failed:
                    self._try(name, once)
                    if name in self.failed:
                        held.clear()

            return run

        return make

    def _try(self, name: str, f: Callable[[], None]) -> None:
        try:
            f()
        except Exception:  # whatever it is, the other sides go on
            self.failed[name] = traceback.format_exc()[-1500:]
            print(f"{name} failed:\n{self.failed[name]}", flush=True)

    def errors(self, name: str, first: str) -> dict[str, str]:
        """Say how far a side's first losses and norms are from those of the ``first`` side."""
        pairs = list(zip(self.seen[name], self.seen[first], strict=True))
        loss = max(relative(float(x[0]), float(y[0])) for x, y in pairs)
        norm = max(relative(float(x[1]), float(y[1])) for x, y in pairs)
        return {"loss off by": f"{loss:.1e}", "norm off by": f"{norm:.1e}"}
