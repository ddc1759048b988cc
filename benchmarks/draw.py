"""Draw pictures of what the scripts of this folder have kept: `--json FILE` there, here

    python benchmarks/draw.py FILE ... --out benchmarks/pictures

    single.svg, packing.svg, ...     how many times as fast fstep is as each peer, a bar a row, with the spread of its rounds
    growth-documents.svg, ...        tokens/s against what grows, both axes logarithmic, the slope written at each line

A picture is named by the first word of its rows. The same lines give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

OURS, PEER, FAINT = "#1f5fa8", "#8a8f98", "#c9ccd1"
COLORS = (OURS, "#c8642b", "#3f8f5b", "#8659a3", PEER)
STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "fstep",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PEER,
    "axes.axisbelow": True,
}
Line = Mapping[str, Any]


def read(paths: Sequence[Path]) -> list[Line]:
    """Return the lines of all files; of those with the same row and facts the last, so that a row can be measured again."""
    found: dict[str, Line] = {}
    for path in paths:
        if not path.exists():
            raise SystemExit(f"draw.py: there is no file {path}")
        for text in path.read_text().splitlines():
            line = json.loads(text)
            found[json.dumps({k: v for k, v in line.items() if k != "sides"}, sort_keys=True)] = line
    return list(found.values())


def first_word(line: Line) -> str:
    """Name the picture that a row belongs to."""
    word = re.split(r"[^\w-]", line.get("series", line["row"]), maxsplit=1)[0]
    return f"growth-{word}" if "series" in line else word


def medians(side: Line) -> float:
    """Return the seconds of a side's step."""
    return statistics.median(side["seconds"])


def speedups(line: Line) -> list[tuple[str, float, float, float]]:
    """Return (peer, times as fast, 10%, 90%) for every peer of a row; rounds are paired where both had as many."""
    ours = [s for s in line["sides"] if s["name"].startswith("fstep")][:1]
    out = []
    for peer in (s for own in ours for s in line["sides"] if not s["name"].startswith("fstep")):
        a, b = peer["seconds"], ours[0]["seconds"]
        ratios = sorted(x / y for x, y in zip(a, b, strict=False))
        edge = len(ratios) // 10
        out.append((peer["name"], medians(peer) / medians(ours[0]), ratios[edge], ratios[-1 - edge]))
    return out


def labels(lines: Sequence[Line]) -> list[str]:
    """Name each row by what comes after its first word and, where that says too little, by the facts that tell it apart."""
    rest = [line["row"][len(first_word(line)) :].strip(" :,") for line in lines]
    hidden = ("row", "sides", "machine", "series", "x")
    facts = [{k: v for k, v in line.items() if k not in hidden and isinstance(v, str | int | float)} for line in lines]
    out = []
    for i, name in enumerate(rest):
        same = [facts[j] for j, other in enumerate(rest) if other == name]
        telling = [k for k in facts[i] if any(f.get(k) != facts[i][k] for f in same)]
        out.append(", ".join([name] * bool(name) + [f"{k} {facts[i][k]}" for k in telling]))
    return out


def bars(name: str, lines: Sequence[Line]) -> Any:
    """Draw how many times as fast fstep is as its peers."""
    rows: list[tuple[str, float, float, float]] = []
    for line, label in zip(lines, labels(lines), strict=True):
        for peer, value, low, high in speedups(line):
            rows.append((f"{label} | {peer}" if label else peer, value, low, high))
    edge = max(1.0, *(max(row[1], row[3]) for row in rows))
    wide = 4 + 0.085 * max(len(row[0]) for row in rows)
    fig, ax = plt.subplots(figsize=(wide, 1.1 + 0.34 * len(rows)))
    for y, (_, value, low, high) in enumerate(rows):
        ax.barh(y, value, color=OURS if value >= 1 else PEER, height=0.62)
        ax.plot([low, high], [y, y], color="black", linewidth=1)
        ax.text(1.04 * edge, y, f"{value:.2f}", va="center", ha="left", fontweight="bold" if value >= 1 else "normal")
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.12 * edge)
    ax.tick_params(axis="y", length=0)
    fig.suptitle(f"{name}: times as fast as the peer, line: 10% .. 90% of rounds", x=0.01, ha="left", fontsize=10)
    ax.set_xlabel("; ".join(sorted({line["machine"] for line in lines})), color=PEER, fontsize=8)
    return fig


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent k of the power law y = c x^k that fits best."""
    x, y = zip(*((math.log(a), math.log(b)) for a, b in points), strict=True)
    return statistics.linear_regression(x, y).slope


def growth(name: str, lines: Sequence[Line]) -> Any:
    """Draw tokens/s against what grows, a line for each side."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for side in line["sides"]:
            curves.setdefault(side["name"], []).append((line["x"], line["tokens"] / medians(side)))
    fig, ax = plt.subplots(figsize=(5.6, 3.8))
    wanted = lines[0].get("ideal")
    for (side, found), color in zip(curves.items(), COLORS, strict=False):
        points = sorted(found)
        x, y = zip(*points, strict=True)
        if wanted is not None and side == next(iter(curves)):
            ideal = [y[0] * (v / x[0]) ** wanted for v in x]
            ax.plot(x, ideal, color=FAINT, linewidth=3, zorder=0, label=f"slope {wanted:g}")
        text = f"{side}: slope {slope(points):.2f}" if len(points) > 1 else side
        ax.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.5, label=text)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({p[0] for found in curves.values() for p in found})
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    # A flat curve gets room, so that noise does not look like a trend; numbers are those that people read.
    low, high = min(low, high / 4), max(high, low * 4)
    ax.set_ylim(low, high)
    steps = [m * 10.0**e for e in range(-3, 12) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_yticks(steps, [f"{s:,.0f}" if s >= 1 else f"{s:g}" for s in steps])
    ax.grid(color=FAINT, linewidth=0.5)
    ax.set_xlabel(lines[0]["series"])
    ax.set_title(f"tokens/s, {lines[0]['about']}", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    fig.text(0.01, 0.005, lines[0]["machine"], color=PEER, fontsize=8)
    return fig


def draw(lines: Sequence[Line], out: Path) -> list[Path]:
    """Draw every picture there is something for, and return the files."""
    pictures: dict[str, list[Line]] = {}
    for line in lines:
        if "series" in line or speedups(line):
            pictures.setdefault(first_word(line), []).append(line)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(dict(STYLE)):
        for name, members in sorted(pictures.items()):
            fig = growth(name, members) if "series" in members[0] else bars(name, members)
            files.append(out / f"{name}.svg")
            fig.tight_layout()
            fig.savefig(files[-1], metadata={"Date": None, "Creator": None})
            plt.close(fig)
    return files


def main() -> None:
    """Read the files and draw."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="+", help="JSON lines that --json wrote")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    a = p.parse_args()
    for file in draw(read(a.files), a.out):
        print(file)


if __name__ == "__main__":
    main()
