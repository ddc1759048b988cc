"""Time several sides of one comparison in turns, in one process, and write the table.

    rounds    fstep peer  fstep peer  fstep peer ...      the card's clock and heat are the same for both
    a row     median | 10% .. 90% | ratio to the first | peak memory, less what the other sides hold

Over ranks a step takes as long as its slowest rank, and memory is that of the fullest.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One side of a comparison: seconds of each step, the peak of its memory in bytes, and what else there is to say."""

    name: str
    seconds: tuple[float, ...]
    peak: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds of the step in the middle."""
        return statistics.median(self.seconds)

    def at(self, share: float) -> float:
        """Seconds that this share of the steps stays below."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def on_gpu() -> bool:
    """Say whether there is a GPU to measure on."""
    return torch.cuda.is_available()


def sync() -> None:
    """Wait for the device."""
    if on_gpu():
        torch.cuda.synchronize()


def slowest(x: float) -> float:
    """Return the largest of all ranks' numbers."""
    if not dist.is_initialized():
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.tensor(x, dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _held() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else 0


def _once(step: Step, repeat: int, clock: Callable[[], float]) -> float:
    sync()
    if dist.is_initialized():
        dist.barrier()
    start = clock()
    for _ in range(repeat):
        step()
    sync()
    return slowest((clock() - start) / repeat)


def in_turns(
    sides: Mapping[str, Callable[[], Step]],
    *,
    steps: int = 20,
    warmup: int = 3,
    repeat: int = 1,
    burst: int = 1,
    apart: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Build each side and time ``steps`` of each, in turns; a step is ``repeat`` calls, if one is too short to time.

    A side's peak counts what it holds between steps and what a step adds, not what others hold. ``apart`` builds, times and
    drops one side after the other, where they do not fit into memory together. ``burst`` steps of a side follow one another,
    behind one that is not timed and with the allocator's cache emptied before, so that sides do not break up each other's
    memory. ``clock`` is `time.process_time` where a CPU
    is measured that others use too.
    """
    if apart:
        found = []
        for name, build in sides.items():
            found += in_turns({name: build}, steps=steps, warmup=warmup, repeat=repeat, burst=burst, clock=clock)
            gc.collect()
            if on_gpu():
                torch.cuda.empty_cache()
        return found
    run: dict[str, Step] = {}
    own: dict[str, int] = {}
    for name, build in sides.items():
        before = _held()
        run[name] = build()
        for _ in range(warmup):
            run[name]()
        sync()
        gc.collect()
        own[name] = _held() - before
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    first = not dist.is_initialized() or dist.get_rank() == 0
    for at in tqdm(range(0, steps, burst), desc=" / ".join(sides), disable=None if first else True, leave=False):
        for name, step in run.items():
            if burst > 1:
                if on_gpu():
                    torch.cuda.empty_cache()
                step()
            sync()
            if on_gpu():
                torch.cuda.reset_peak_memory_stats()
            before = _held()
            seconds[name] += [_once(step, repeat, clock) for _ in range(min(burst, steps - at))]
            peak = torch.cuda.max_memory_allocated() if on_gpu() else 0
            peaks[name] = max(peaks[name], peak - before + own[name])
    return [Timing(name, tuple(seconds[name]), int(slowest(peaks[name]))) for name in sides]


def table(rows: Sequence[Timing], *, work: float | None = None, unit: str = "tokens/s") -> str:
    """Return a Markdown table; each is compared with the first. ``work`` is what a step gets done, in ``unit`` times s."""
    names = sorted({key for row in rows for key in row.notes})
    head = ["", "median ms", "10% .. 90%", "time against the first"] + ([unit] if work else []) + ["peak GiB", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ms = [row.name, f"{row.median * 1e3:.4g}", f"{row.at(0.1) * 1e3:.4g} .. {row.at(0.9) * 1e3:.4g}"]
        more = [f"{row.median / rows[0].median:.3f}"] + ([f"{work / row.median:,.0f}"] if work else [])
        lines.append(
            "| " + " | ".join([*ms, *more, f"{row.peak / 2**30:.2f}", *(str(row.notes.get(n, "")) for n in names)]) + " |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Name what was measured on, and with which torch."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    name = torch.cuda.get_device_name() if on_gpu() else "CPU"
    return f"{ranks} x {name}, torch {torch.__version__}"


def keep(path: Path | None, row: str, rows: Sequence[Timing], **facts: Any) -> None:
    """Add a comparison to a file of JSON lines, from which pictures are drawn; rank 0 writes."""
    if path is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"row": row, "machine": machine(), **facts, "sides": [asdict(r) for r in rows]}) + "\n")
