"""What the tests of this room run under: the devices there are, and a guard against waiting for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class _NoWaiting(TorchDispatchMode):
    """Raise where Python reads the value of a tensor: on an accelerator that line waits for all queued work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "this code waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def guard() -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        try:
            with _NoWaiting():
                yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    return guard
