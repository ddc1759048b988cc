"""`TrainState`: all that a training run is, as one immutable tree.

TrainState ── params     what the model computes with
           ├─ opt        what the optimizer remembers; None for a frozen parameter
           ├─ step       steps taken, counting those that were skipped
           ├─ skipped    steps whose gradient was not finite and changed nothing
           ├─ key        where randomness comes from
           └─ data       where in the data the run stands: epoch and index
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fstep.batch.loader import DataPosition
from fstep.key import Key
from fstep.tree import pytree


class DonatedError(RuntimeError):
    """Raised when a state is read whose memory an update with ``donate=True`` has reused.

    >>> import torch, fstep
    >>> state = fstep.init_state({"w": torch.zeros(1)}, fstep.sgd)
    >>> new = fstep.sgd.update(state, {"w": torch.ones(1)}, lr=0.1, donate=True)
    >>> try:
    ...     state.params
    ... except fstep.DonatedError:
    ...     print("gone")
    gone
    """


@pytree
class TrainState:
    """Params, optimizer state and counters of a run; a step takes one and returns the next.

    Counters are 0-d tensors, so that a state is one tree to save, compare or map over.

    >>> import torch, fstep
    >>> state = fstep.init_state({"w": torch.zeros(2)}, fstep.sgd)
    >>> isinstance(state, fstep.TrainState), int(state.step)
    (True, 0)
    """

    params: Any
    opt: Any
    step: Tensor
    skipped: Tensor
    key: Key
    data: DataPosition

    def __getattr__(self, name: str) -> NoReturn:
        # Reached only for what normal lookup does not find: a misspelt name, or any field once the state was donated.
        if name.startswith("__") or name not in type(self).__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise DonatedError(
            f"TrainState.{name}: this state was donated and its memory belongs to the state that the update returned; "
            "use that one, or call the update without donate=True"
        )


def init_state(
    params: Any, optimizer: Any, *, key: Key | None = None, trainable: Callable[[str], bool] | None = None
) -> TrainState:
    """Return the state a run starts from: ``params``, what ``optimizer.init`` makes of them, and counters at 0.

    ``trainable`` is a predicate on the params' paths; a leaf it refuses has no optimizer state. ``key`` defaults to
    ``Key.seed(0)``.

    >>> import torch, fstep
    >>> state = fstep.init_state({"w": torch.zeros(2), "b": torch.zeros(1)}, fstep.adamw, trainable=lambda path: path == "w")
    >>> state.opt.mu
    {'w': tensor([0., 0.]), 'b': None}
    """
    if isinstance(optimizer, type) or not hasattr(optimizer, "init"):
        raise TypeError(
            f"init_state: optimizer is {optimizer!r}; pass a value with init and update, e.g. fstep.adamw or fstep.AdamW()"
        )
    return TrainState(
        params=params,
        opt=optimizer.init(params, trainable=trainable),
        step=torch.tensor(0),
        skipped=torch.tensor(0),
        key=Key.seed(0) if key is None else key,
        data=DataPosition.start(),
    )
