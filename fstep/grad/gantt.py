"""Schedules as pictures: one row a rank, one box an action, time to the right, gaps are idle time."""

from __future__ import annotations

from fstep.grad.schedule import Costs, Schedule

COLOURS = {"F": "#7fa8d9", "B": "#8fc28a", "I": "#8fc28a", "W": "#d9c27f"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input half", "W": "backward, weight half"}
UNIT, ROW, LEFT, TOP = 22, 26, 64, 34


def draw_schedule(schedule: Schedule, costs: Costs) -> str:
    """Return an SVG picture; stages after a rank's first are drawn in a darker shade."""
    rows, stats = schedule.timeline(costs), schedule.stats(costs)
    width, height = LEFT + UNIT * stats.length + 16, TOP + ROW * len(rows) + 40
    kinds = [k for k in COLOURS if any(s.action.kind == k for row in rows for s in row)]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        f'<text x="8" y="20" font-size="13">{schedule.name}: {len(rows)} ranks, {schedule.stages} stages, '
        f"{schedule.microbatches} microbatches, {stats.idle:.0%} idle</text>",
    ]
    for rank, row in enumerate(rows):
        y = TOP + ROW * rank
        stages = schedule.stages_of(rank)
        out.append(f'<text x="8" y="{y + 17}">rank {rank}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{UNIT * stats.length:g}" height="{ROW - 2}" fill="#eeeeee"/>')
        for span in row:
            x, w = LEFT + UNIT * span.start, UNIT * (span.end - span.start)
            shade = 0.55 * stages.index(span.action.stage) / max(1, len(stages) - 1)
            box = f'x="{x:g}" y="{y}" width="{w:g}" height="{ROW - 2}"'
            out.append(f'<rect {box} fill="{COLOURS[span.action.kind]}" stroke="white"/>')
            if shade:
                out.append(f'<rect {box} fill="#334455" fill-opacity="{shade / 2:.2f}"/>')
            out.append(
                f'<text x="{x + w / 2:g}" y="{y + 16}" text-anchor="middle">{span.action.microbatch}'
                f"<title>{span.action.kind}: stage {span.action.stage}, microbatch {span.action.microbatch}</title></text>"
            )
    x, y = LEFT, TOP + ROW * len(rows) + 12
    for kind in kinds:
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[kind]}"/>')
        out.append(f'<text x="{x + 20}" y="{y + 11}">{NAMES[kind]}</text>')
        x += 40 + 7 * len(NAMES[kind])
    return "\n".join([*out, "</svg>"])
