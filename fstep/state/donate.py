"""Donation: the one way in which a value is used up, always asked for with ``donate=True`` where it happens."""

from __future__ import annotations

from fstep.state.state import TrainState


def bury(state: TrainState) -> None:
    """Mark ``state`` dead; reading any of its fields raises `DonatedError` from now on."""
    vars(state).clear()
