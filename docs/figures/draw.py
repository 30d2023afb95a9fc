"""Draws the picture of the front page from the log files of a finished quickstart run.

    python docs/figures/draw.py runs/quickstart docs/figures/quickstart.svg

Left: the hidden size after every step. Right: the KL term of the training loss, which is logged every ten steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RUNS = {  # folder below the run folder -> (label, colour, line style)
    "compare/plain_one_shot": ("one cut, neurons selected (plain_one_shot)", "#b3541e", "--"),
    "compare/one_shot": ("one cut, compensated (one_shot)", "#7d7d7d", ":"),
    ".": ("gradual, compensated (homodistil)", "#1f5a94", "-"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "svg.hashsalt": "homodistil",  # the same run gives the same bytes
}


def main(run_dir: Path, out: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        widths, gap = figure.subplots(1, 2)
        for folder, (label, color, line_style) in RUNS.items():
            style = {"label": label, "color": color, "linestyle": line_style}
            _draw_widths(widths, run_dir / folder, style)
            _draw_gap(gap, run_dir / folder, style)
        widths.set(title="hidden size", xlabel="optimizer step", ylim=(0, None))
        gap.set(title="KL to the teacher (training batches)", xlabel="optimizer step", ylim=(0, None))
        gap.legend(frameon=False)
        figure.savefig(out, metadata={"Date": None, "Creator": None})


def _draw_widths(axes: Axes, folder: Path, style: dict) -> None:
    events = _lines(folder / "events.jsonl")
    steps = [0] + [event["step"] for event in events] + [_lines(folder / "metrics.jsonl")[-1]["step"]]
    sizes = [events[0]["widths_before"]["hidden"]] + [event["widths_after"]["hidden"] for event in events]
    axes.plot(steps, [*sizes, sizes[-1]], drawstyle="steps-post", **style)


def _draw_gap(axes: Axes, folder: Path, style: dict) -> None:
    rows = [row for row in _lines(folder / "metrics.jsonl") if "loss/kl" in row]
    axes.plot([row["step"] for row in rows], [row["loss/kl"] for row in rows], **style)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
