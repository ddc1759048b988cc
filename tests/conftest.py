"""What every test runs under: one thread, deterministic kernels, and global state that comes out as it went in.

fstep reads no global random state, but the models that serve as oracles do when they are initialised. Each test
therefore starts from the same global state, and no test's numbers depend on which tests ran before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# Besides choosing kernels this fills uninitialised memory with NaN, so that a function that reads it cannot pass.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def unchanged_globals() -> Iterator[None]:
    """Fail a test that leaves torch's global settings changed, and put them back for the next one."""
    before = _settings()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
    after = _settings()
    torch.set_default_dtype(before["default dtype"])
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic"])
    torch.set_grad_enabled(before["grad enabled"])
    changed = [f"{name}: {before[name]} became {after[name]}" for name in before if before[name] != after[name]]
    if changed:
        pytest.fail("the test left a global setting of torch changed; " + "; ".join(changed), pytrace=False)


def _settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad enabled": torch.is_grad_enabled(),
    }
