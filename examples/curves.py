"""Learning curves: rows of numbers kept in a file, and drawn with a line for each seed.

{"step": 0, "loss": 0.69, "accuracy": 0.5}     a panel for each column, a colour for each method,
{"step": 1, "loss": 0.66}                      a kind of line for each seed; a row without the column is passed over
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def picture(name: str) -> Path:
    """Take a path from the command line; refuse now what could not be written at the end."""
    path = Path(name)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{name} is no .svg and no .png")
    return path


def add_row(file: Path, row: Row) -> None:
    """Append a line of JSON, so that a run that is ended leaves what it has; what is not finite becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with file.open("a") as lines:
        lines.write(json.dumps(finite) + "\n")


def draw_curves(
    runs: Mapping[str, Sequence[Sequence[Row]]], columns: Sequence[str], file: Path, *, title: str = "",
    log_scale: Sequence[str] = (),
) -> str:  # fmt: skip
    """Draw each of ``columns`` over the steps; say what was done. ``runs`` are the rows of each seed, by method.

    Equal rows give an equal file: nothing in it tells when or where it was drawn.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no picture: pip install matplotlib draws the curves"
    with matplotlib.rc_context({"svg.hashsalt": "fstep", "svg.fonttype": "none"}):
        figure, panels = plt.subplots(1, len(columns), figsize=(3.6 * len(columns), 3), squeeze=False)
        for column, axes in zip(columns, panels[0], strict=True):
            for color, (name, seeds) in enumerate(runs.items()):
                for seed, rows in enumerate(seeds):
                    points = [(r["step"], r[column]) for r in rows if column in r]
                    style = {"color": f"C{color}", "linestyle": ("-", "--", ":", "-.")[seed % 4], "linewidth": 1.2}
                    axes.plot(*zip(*points, strict=True), **style, label=name if seed == 0 and len(runs) > 1 else None)
            axes.set(title=column, xlabel="step", yscale="log" if column in log_scale else "linear")
            axes.grid(alpha=0.3)
        if len(runs) > 1:
            panels[0][0].legend()
        figure.suptitle(title)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)
    return f"curves: {file}"
