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
    program: str, arguments: Sequence[str], folder: Path, *, size: int, limit: float, **environment: str
) -> tuple[list[int], list[str]]:
    """Run a module, or a script by its path, on every rank; return their exit codes and what they wrote to stderr.

    What they print is in ``folder / "0.out"`` and so on. What still runs after ``limit`` seconds is killed, and its exit
    code says so.
    """
    command = [sys.executable, *([program] if program.endswith(".py") else ["-m", program]), *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", **environment}
    with contextlib.ExitStack() as stack:
        ranks = []
        for r in range(size):
            out, err = (stack.enter_context((folder / f"{r}.{name}").open("w")) for name in ("out", "err"))
            env = {**common, "RANK": str(r), "LOCAL_RANK": str(r)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
            stack.callback(ranks[-1].wait)
            stack.callback(ranks[-1].kill)
        deadline = time.monotonic() + limit
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
    return [rank.returncode for rank in ranks], [(folder / f"{r}.err").read_text() for r in range(size)]
