"""Panels of lines as inline SVG. Every line has a label at its end, so that figures are readable without colour."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from homodistil.report.run import Points

MAX_POINTS = 400  # per line: more cannot be told apart at this size, and pages of long runs stay small
MAX_TICKS = 7  # of a logarithmic axis at this height: with more, the numbers would touch
WIDTH_INCHES, HEIGHT_INCHES = 9.0, 2.7
_LABEL_GAP = 0.075  # between labels at the ends of lines, as a share of the height

_COLORS = ("#111111", "#1f5a94", "#b3541e", "#2f7d4f", "#7a4a94", "#7d7d7d")
_DASHES = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    # Text stays text (small, searchable); a fixed salt makes the same run give the same page.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "homodistil",
}


@dataclass(frozen=True)
class Line:
    label: str
    """Written at the end of the line. Empty: no label, because another line of the same group has it."""
    points: Points
    color: str | None = None
    """None: `style` decides colour and dash. With a colour, the line is thin and solid."""
    style: int | None = None
    """Number of the colour and dash, shared by the lines of a group; None: the line's position in the panel."""


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line] = field(default_factory=list)
    stairs: bool = False
    """Draw steps: each value holds until the next one (widths)."""
    saw_tooth: bool = False
    """Points come in pairs at one step, before and after a resize: hollow and filled markers."""
    log_when_wide: bool = False
    """Logarithmic when positive values span more than a factor of 20."""
    from_zero: bool = False


def draw(panels: Sequence[Panel], ident: str, description: str) -> str:
    """One SVG element with the panels side by side, two per row. For `ident` and `description` see `inline`."""
    return inline(compose(panels), ident, description)


def compose(panels: Sequence[Panel]) -> Figure:
    """A figure of the panels side by side, two per row."""
    return side_by_side([lambda axes, panel=panel: _draw_panel(axes, panel) for panel in panels])


def side_by_side(drawers: Sequence[Callable[[Axes], None]], height_inches: float = HEIGHT_INCHES) -> Figure:
    """A figure with one axes per drawer, two per row; each drawer is called with its axes."""
    columns = min(2, len(drawers))
    rows = math.ceil(len(drawers) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches * rows), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, hspace=0.08)
        for i, draw_into in enumerate(drawers):
            draw_into(figure.add_subplot(rows, columns, i + 1))
    return figure


def inline(figure: Figure, ident: str, description: str) -> str:
    """The figure as one SVG element.

    Args:
        ident: prefix of the ids in the SVG; must differ between the figures of a page.
        description: what the figure shows, for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), ident, description)


def export(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/name.png and folder/name.svg. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def look(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th line: 36 combinations; neighbours differ in their dash, too."""
    count = len(_COLORS)
    return {"color": _COLORS[i % count], "linestyle": _DASHES[(i + i // count) % count]}


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    drawn = [
        _draw_line(axes, panel, line, i if line.style is None else line.style) for i, line in enumerate(panel.lines)
    ]
    _set_scale(axes, panel)
    if len(panel.lines) > 1:
        _label_ends(axes, [(line.label, curve) for line, curve in zip(panel.lines, drawn, strict=True) if line.label])


def _draw_line(axes: Axes, panel: Panel, line: Line, i: int) -> Line2D:
    steps, values = _columns(line.points if panel.saw_tooth else thinned(line.points))
    marks = {"marker": "o", "markersize": 2.5} if len(steps) <= 12 and not panel.saw_tooth else {}
    style = look(i)
    if panel.saw_tooth:
        style["linewidth"] = 0.7
    if line.color:
        style = {"color": line.color, "linewidth": 0.8}
    (curve,) = axes.plot(steps, values, drawstyle="steps-post" if panel.stairs else "default", **style, **marks)
    if panel.saw_tooth:
        size = 3.5 if len(steps) < 60 else 2
        plain = {"linestyle": "none", "marker": "o", "markersize": size, "color": style["color"]}
        axes.plot(steps[0::2], values[0::2], markerfacecolor="white", markeredgewidth=0.8, label="before", **plain)
        axes.plot(steps[1::2], values[1::2], label="after", **plain)
        if len(panel.lines) == 1:
            axes.legend(frameon=False, loc="best", title=None, handletextpad=0.2)
    return curve


def thinned(points: Points) -> Points:
    """Every k-th point so that at most `MAX_POINTS` remain; the last one always stays."""
    stride = math.ceil(len(points) / MAX_POINTS)
    if stride <= 1:
        return list(points)
    kept = list(points[::stride])
    return kept if (len(points) - 1) % stride == 0 else kept[:-1] + [points[-1]]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    """Steps and values of `points`; a value that was not finite becomes NaN, a gap in the line."""
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _set_scale(axes: Axes, panel: Panel) -> None:
    values = [v for line in panel.lines for _, v in line.points if v is not None]
    if panel.log_when_wide and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        return
    if panel.from_zero and values and min(values) >= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)
    if values and max(values) >= 10_000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks between `low` and `high` of a logarithmic axis, at most `MAX_TICKS`.

    The densest of these that fits: 1, 2 and 5 of every decade; 1 and 3; 1 alone; every n-th decade.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MAX_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / MAX_TICKS)]


def _label_ends(axes: Axes, curves: Sequence[tuple[str, Line2D]]) -> None:
    """Write each label to the right of its line's last point.

    Labels of lines that end close together are moved apart; a thin line then connects label and point.
    """
    ends = []
    for label, curve in curves:
        finite = [(x, y) for x, y in zip(curve.get_xdata(), curve.get_ydata(), strict=True) if math.isfinite(y)]
        if finite:
            ends.append((finite[-1], label, curve.get_color()))
    axes.set_ylim(axes.get_ylim())  # freeze: the positions below are fractions of the current range
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [to_fraction.transform(point)[1] for point, _, _ in ends]
    # Many labels are smaller, so that they stay nearer to their lines.
    gap = _LABEL_GAP if len(ends) <= 8 else min(0.8 * _LABEL_GAP, 1 / len(ends))
    size = _STYLE["font.size"] * max(gap / _LABEL_GAP, 0.6)
    for (point, label, color), height, y in zip(ends, heights, within(spread(heights, gap), gap), strict=True):
        text = {"color": color, "va": "center", "annotation_clip": False, "fontsize": size}
        if abs(y - height) > 0.01:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.6}
            text["arrowprops"] = {**line, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}
        axes.annotate(label, point, xytext=(1.05, y), textcoords="axes fraction", **text)


def within(heights: Sequence[float], gap: float) -> list[float]:
    """Move `heights`, which are `gap` apart, into the range 0 to 1 as far as there is space; their order is kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    result, limit = list(heights), 1.0
    for i in reversed(order):
        result[i] = min(result[i], limit)
        limit = result[i] - gap
    limit = 0.0
    for i in order:
        result[i] = max(result[i], limit)
        limit = result[i] + gap
    return result


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move `heights` as little as needed to be `gap` apart, order kept. Overlapping ones are centred as a block."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # (centre, members), from below
    for i in order:
        centre, members = heights[i], 1
        while blocks and centre - members * gap / 2 < blocks[-1][0] + blocks[-1][1] * gap / 2:
            below, count = blocks.pop()
            centre, members = (below * count + centre * members) / (count + members), count + members
        blocks.append((centre, members))
    placed = [centre + (k - (members - 1) / 2) * gap for centre, members in blocks for k in range(members)]
    result = [0.0] * len(heights)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _inline(svg: str, ident: str, description: str) -> str:
    """The <svg> element of a document, scaling with the page; its ids get the prefix `ident`, unique on the page."""
    view_box = re.search(r'viewBox="([^"]*)"', svg).group(1)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r'\bid="', f'id="{ident}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{ident}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    return f'<svg role="img" aria-label="{html.escape(description)}" viewBox="{view_box}">{body}'
