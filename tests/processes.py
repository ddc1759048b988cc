"""Starting real ranks for a test, as torchrun would: processes that find each other through the environment."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(
    module: str, arguments: Sequence[str], folder: Path, *, size: int, limit: float
) -> tuple[list[int], list[str]]:
    """Run ``python -m module arguments`` on every rank; return their exit codes and what they wrote to stderr.

    What still runs after ``limit`` seconds is killed, and its exit code says so.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        ranks = []
        for r in range(size):
            err = stack.enter_context((folder / f"{r}.err").open("w"))
            env = {**common, "RANK": str(r), "LOCAL_RANK": str(r)}
            ranks.append(subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, stderr=err))
            stack.callback(ranks[-1].wait)
            stack.callback(ranks[-1].kill)
        deadline = time.monotonic() + limit
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
    return [rank.returncode for rank in ranks], [(folder / f"{r}.err").read_text() for r in range(size)]
