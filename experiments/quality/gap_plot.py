"""The figure of the gap study: KL, hidden and attention distance over training; readable in black and white."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.quality.gap_study import Course

TITLES = {
    "kl": "KL to teacher (nats)",
    "hidden/layer": "hidden distance, layer",
    "attention/layer": "attention-score distance, layer",
}
_SHADES = ("#000000", "#1f5a94", "#b3541e", "#2f7d4f", "#7d7d7d")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 2)))
_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "homodistil"}


def draw(paths: list[Course], seed: int, name: Path) -> None:
    """{name}.png and {name}.svg: a panel a term, a line an end of pruning, of one seed."""
    paths = [path for path in paths if seed in path.curves]
    terms = [t for t in paths[0].curves[seed] if t == "kl" or t.startswith(("hidden/layer", "attention/layer"))]
    with rc_context(_STYLE):
        num_rows = math.ceil(len(terms) / 2)
        figure = Figure(figsize=(9, 2.7 * num_rows), layout="constrained")
        for i, term in enumerate(terms):
            _panel(figure.add_subplot(num_rows, 2, i + 1), term, paths, seed)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(paths), frameon=False)
        name.parent.mkdir(parents=True, exist_ok=True)
        for end, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            figure.savefig(name.with_name(name.name + end), **options)


def _panel(axes: Axes, term: str, paths: list[Course], seed: int) -> None:
    prefix, _, layer = term.partition(".")
    axes.set_title(f"{TITLES.get(prefix, term)} {layer}".strip(), loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    for path, shade, dash in zip(paths, _SHADES, _DASHES, strict=False):
        steps, values = zip(*path.curves[seed][term], strict=True)
        axes.plot(steps, values, color=shade, linestyle=dash, linewidth=1.1, label=path.end)
    axes.set_ylim(bottom=0)
