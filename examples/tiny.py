"""What the examples on a laptop share: their command line, their mesh, and the first lessons of a tiny model."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from curves import Row, add_row, draw_curves, picture
from sft import sft_step
from tqdm import tqdm

import fstep
from fstep_models.dense import Dense


@dataclass(frozen=True)
class Place:
    """Where a model trains: the ranks, and this rank's device. Rank 0 speaks and writes."""

    mesh: fstep.Mesh
    device: torch.device

    def say(self, text: str) -> None:
        """Print once, not once a rank."""
        if self.mesh.rank == 0:
            tqdm.write(text)

    def bar(self, steps: int, what: str) -> tqdm:
        """Return a bar that shows how far the run is."""
        return tqdm(total=steps, unit="step", desc=what, disable=self.mesh.rank > 0)


def learn(
    model: Dense, params: Any, docs: fstep.Docs, *, steps: int, peak: float, key: fstep.Key, at: Place, what: str,
    each: Callable[[int, Any], None] = lambda step, params: None,
) -> Any:  # fmt: skip
    """Return params trained on documents with sft.py's step; ``each`` is told of the params before every step, and after."""
    state = fstep.init_state(fstep.tree_map(torch.clone, params), fstep.adamw, key=key)  # the step donates what it is given
    with at.bar(steps, what) as bar:
        for step in range(steps):
            each(step, state.params)
            rows, position = fstep.draw_documents(state.data, num=64, of=len(docs.lengths), key=state.key)
            lr = fstep.warmup_cosine(step, peak=peak, warmup=min(10, steps), total=steps, floor=peak / 10)
            state, metrics = sft_step(
                replace(state, data=position), fstep.select_documents(docs, rows), model=model, mesh=at.mesh,
                optimizer=fstep.adamw, lr=lr, schedule="1f1b", max_tokens=4096, device=at.device,
            )  # fmt: skip
            bar.set_postfix_str(f"loss {float(metrics['loss']):.3f}")
            bar.update()
    each(steps, state.params)
    return state.params


def count(text: str, least: int = 1) -> int:
    """Take a whole number of 1 or more from the command line."""
    if (number := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{number} is not {least} or more")
    return number


def several(text: str) -> int:
    """Take a whole number of 2 or more from the command line."""
    return count(text, least=2)


def positive(text: str) -> float:
    """Take a number above 0 from the command line."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def not_negative(text: str) -> float:
    """Take a number of 0 or more from the command line."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of 0 or more")
    return number


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a command line with what every example takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="train once for each")
    p.add_argument("--out", type=Path, default=Path(out), help="folder of metrics.jsonl and curves.png")
    p.add_argument("--picture", type=picture, help="draw the curves here, .svg or .png")
    for axis, what in (("pp", "pipeline stages"), ("cp", "chunks of each document"), ("tp", "slices of each weight")):
        p.add_argument(f"--{axis}", type=count, default=1, help=f"ranks for {what}; the rest divide the documents")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def run(
    p: argparse.ArgumentParser, train: Callable[..., None], models: Sequence[Dense], columns: Sequence[str], title: str,
    log_scale: Sequence[str] = (),
) -> None:  # fmt: skip
    """Call ``train(arguments, seed, place, log)`` for each seed on the mesh that is asked for, and draw what it logs.

    A row has a "step" and a "method", which gives its line a colour.
    """
    a = p.parse_args()
    if len(set(a.seeds)) < len(a.seeds):
        p.error(f"argument --seeds: {a.seeds} has one twice")
    metrics, rows = a.out / "metrics.jsonl", list[Row]()
    with contextlib.ExitStack() as stack:
        try:
            mesh = stack.enter_context(fstep.mesh_from_env(pp=a.pp, cp=a.cp, tp=a.tp))
            device = torch.device(a.device, torch.cuda.current_device()) if a.device == "cuda" else torch.device(a.device)
            torch.zeros(1, device=device)
            for model in models:
                model.spec(mesh)  # says now what cannot be cut so
            if mesh.rank == 0:
                for folder in (a.out, (a.picture or a.out / "curves.png").parent):
                    folder.mkdir(parents=True, exist_ok=True)
                metrics.write_text("")
        except (ValueError, RuntimeError, AssertionError, OSError) as problem:
            sys.exit(f"{p.prog}: {problem}")
        if device.type == "cpu":
            torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much on a busy machine

        def log(row: Row) -> None:
            rows.append(row)
            if mesh.rank == 0:
                add_row(metrics, row)

        for seed in a.seeds:
            train(a, seed, Place(mesh, device), lambda row, seed=seed: log({"seed": seed, **row}))
        if mesh.rank == 0:
            runs = {
                m: [[r for r in rows if (r["method"], r["seed"]) == (m, s)] for s in a.seeds]
                for m in dict.fromkeys(r["method"] for r in rows)
            }
            print(draw_curves(runs, columns, a.picture or a.out / "curves.png", title=title, log_scale=log_scale))
