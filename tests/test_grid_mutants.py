"""Each of these mistakes has been made by somebody; each must make the comparison of the grid fail, naming what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fstep.mesh.exchange as exchange
import fstep.update.reduce as reduce
from fstep import Ratio
from fstep.grad import own, pipeline
from fstep.grad.interpret import Run
from fstep.ops import gathered
from tests.grid import CASES, alone, compare

Patch = Callable[[pytest.MonkeyPatch], None]


def scaled(factor: float) -> Patch:
    real = own.read_grads
    return lambda mp: mp.setattr(own, "read_grads", lambda leaves: [g * factor for g in real(leaves)])


def averaged(mp: pytest.MonkeyPatch) -> None:
    """Every rank's gradient is the mean of what the ranks have, as in a framework that averages by default."""
    real = reduce.psum
    mp.setattr(reduce, "psum", lambda x, axis, title: real(x, axis, title) / (axis.size if x.dim() else 1))


def reduced_twice(mp: pytest.MonkeyPatch) -> None:
    real = reduce.psum
    mp.setattr(reduce, "psum", lambda x, axis, title: real(real(x, axis, title) if x.dim() else x, axis, title))


def rolled_sample(mp: pytest.MonkeyPatch) -> None:
    """The loss sees the labels of the place before."""
    real = pipeline._run_loss
    mp.setattr(pipeline, "_run_loss", lambda fn, params, x, mb: real(fn, params, x, replace(mb, labels=mb.labels.roll(1))))


def dropped_microbatch(mp: pytest.MonkeyPatch) -> None:
    real = Run.__init__

    def init(self: Run, *args: Any) -> None:
        real(self, *args)
        run_loss = self.run_loss

        def loss(x: Any, m: int) -> Any:
            out = run_loss(x, m)
            if m != 3 or self.leaves is None:
                return out
            return Ratio(out[0].num * 0, out[0].den), out[1]

        self.run_loss = loss

    mp.setattr(Run, "__init__", init)


def stale_gradient(mp: pytest.MonkeyPatch) -> None:
    """What is sent back is the gradient of the microbatch before, as when a buffer is used again too early."""
    real = Run._send_back
    last: dict[Any, Any] = {}

    def send(self: Run, action: Any, live: Any, grads: Any) -> None:
        old = last.get((id(self), action.stage), grads)
        last[id(self), action.stage] = grads
        same = [o is not None and o.shape == g.shape for o, g in zip(old, grads, strict=True)]
        real(self, action, live, [o if s else g for o, g, s in zip(old, grads, same, strict=True)])

    mp.setattr(Run, "_send_back", send)


def no_tie(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(reduce, "_sum_copies", lambda x, copies: x)


def slice_instead_of_scatter(mp: pytest.MonkeyPatch) -> None:
    """Each rank keeps its own part of the gradient of gathered keys, as if the loss were the same on all ranks."""
    mp.setattr(gathered, "_add_at_home", lambda dkv, axis, action: dkv[axis.rank])


def norms_left_apart(mp: pytest.MonkeyPatch) -> None:
    """A weight that tensor-parallel ranks share gets the gradient of this rank's tokens only."""
    real = exchange.psum
    mp.setattr(exchange, "psum", lambda x, axis, action="": x if action == "gradient of tp_local" else real(x, axis, action))


MUTANTS: dict[str, tuple[Patch, dict[str, int], str]] = {
    "twice the gradient": (scaled(2.0), {"pp": 2}, "ragged"),
    "half the gradient": (scaled(0.5), {"dp": 2}, "ragged"),
    "sign flipped": (scaled(-1.0), {"cp": 2}, "ragged"),
    "mean over ranks": (averaged, {"dp": 2}, "ragged"),
    "reduced twice": (reduced_twice, {"dp": 2, "pp": 2}, "ragged"),
    "rolled sample": (rolled_sample, {"pp": 2}, "ragged"),
    "dropped microbatch": (dropped_microbatch, {"pp": 2}, "ragged"),
    "stale gradient": (stale_gradient, {"pp": 4}, "ragged"),
    "no tie sum": (no_tie, {"pp": 2}, "tied"),
    "wrong transpose over cp": (slice_instead_of_scatter, {"cp": 2}, "ragged"),
    "norms of tp left apart": (norms_left_apart, {"tp": 2}, "ragged"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, mesh, kind = MUTANTS[name]
    alone(CASES[kind])  # the oracle is of sound mind
    compare(mesh, CASES[kind], context="allgather")
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"is off by|grad_norm is|loss is|evaluation gives"):
        compare(mesh, CASES[kind], context="allgather")
    assert torch.is_grad_enabled()
