"""Size, quality and speed of all models as scatter plots: one shape and label per model, readable without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from homodistil.report.comparison.groups import COLUMNS, Model
from homodistil.report.figures import look, side_by_side, spread, within

_SHAPES = "os^Dv*PX<>hp"
_SMALL, _LARGE = 4.0, 11.0  # marker diameters in points, slowest and fastest
_HEIGHT_INCHES = 3.4
_QUALITY = ("heldout_mlm_loss", "heldout_lm_loss", "cosine_to_teacher", "recall_at_10", "kl_to_teacher", "glue")
_QUALITY += ("masked_top1",)
_SPEED = ("ms_per_sentence", "tokens_per_s")


def scatter(models: Sequence[Model]) -> Figure | None:
    """Quality over size for every measured quality, and the first quality over speed; None if nothing can be shown.

    Speed is the time of a sentence where `homodistil latency` has measured it, else that of training.

    Size is the number of parameters (hidden size where none of the models has it); larger markers are faster.
    """
    # The teacher comes last, so that all other models have the same colours as in the curves.
    models = sorted(models, key=lambda model: model.name.lower().startswith("teacher"))
    size = next((c for c in ("parameters", "hidden_size") if any(c in model.values for model in models)), None)
    measured = qualities(models)
    speed = next((c for c in _SPEED if any(c in model.values for model in models)), _SPEED[-1])
    pairs = [(size, quality) for quality in measured if size] + [(speed, quality) for quality in measured[:1]]
    return scatter_of(models, pairs)


def qualities(models: Sequence[Model]) -> list[str]:
    """Columns of quality that any of the models has, the most telling one first."""
    return [quality for quality in _QUALITY if any(quality in model.values for model in models)]


def scatter_of(models: Sequence[Model], pairs: Sequence[tuple[str, str]]) -> Figure | None:
    """One plot per (column of the x axis, column of the y axis) that some model has both of; None if none has."""
    drawers = [_drawer(models, x, y) for x, y in pairs if any(x in m.values and y in m.values for m in models)]
    return side_by_side(drawers, _HEIGHT_INCHES) if drawers else None


def _drawer(models: Sequence[Model], x: str, y: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        shown = [(i, model) for i, model in enumerate(models) if x in model.values and y in model.values]
        axes.set_title(f"{COLUMNS[y][0]} over {COLUMNS[x][0]}")
        axes.set_xlabel(COLUMNS[x][0])
        diameters = _diameters(models) if x not in _SPEED else [7.0] * len(models)
        for i, model in shown:
            _point(axes, i, model, x, y, diameters[i])
        _x_scale(axes, [model.mean(x) for _, model in shown])
        axes.margins(x=0.12, y=0.12)
        _labels(axes, [(i, model.name, model.mean(x), model.mean(y)) for i, model in shown])

    return draw


def _point(axes: Axes, i: int, model: Model, x: str, y: str, diameter: float) -> None:
    """Draw a model with bars of one standard deviation over seeds. Once all shapes are used, they repeat hollow."""
    color = look(i)["color"]
    fill = color if (i // len(_SHAPES)) % 2 == 0 else "white"
    bars = {"xerr": model.spread(x).deviation, "yerr": model.spread(y).deviation}
    marker = {"marker": _SHAPES[i % len(_SHAPES)], "markersize": diameter, "markerfacecolor": fill}
    axes.errorbar(
        model.mean(x), model.mean(y), **bars, color=color, elinewidth=0.8, capsize=2, linestyle="none", **marker
    )


def _diameters(models: Sequence[Model]) -> list[float]:
    """Marker diameters in points, linear in tokens/s; the middle one where the speed is not known."""
    speeds = [model.mean("tokens_per_s") for model in models]
    known = [speed for speed in speeds if speed is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    middle = (_SMALL + _LARGE) / 2
    return [
        middle if speed is None or high == low else _SMALL + (_LARGE - _SMALL) * (speed - low) / (high - low)
        for speed in speeds
    ]


def _x_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic if the values span more than a factor of 4."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_xscale("log")
        axes.set_xticks(sorted(_far_apart(values)), minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _far_apart(values: Sequence[float]) -> list[float]:
    """Values as ticks, without those whose numbers would overlap."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > kept[-1] * (max(values) / min(values)) ** 0.22:
            kept.append(value)
    return kept


def _short(value: float) -> str:
    """4,416,698 -> 4.42M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def _labels(axes: Axes, points: Sequence[tuple[int, str, float, float]]) -> None:
    """Write the names to the right of the axes, at the height of their points or moved apart, with a thin line."""
    axes.set_xlim(axes.get_xlim())  # freeze: the heights below are fractions of the current range
    axes.set_ylim(axes.get_ylim())
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [to_fraction.transform((x, y))[1] for _, _, x, y in points]
    gap = min(0.065, 1 / max(len(points), 1))
    for (i, name, x, y), height in zip(points, within(spread(heights, gap), gap), strict=True):
        line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)}
        at = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(name, (x, y), color=look(i)["color"], arrowprops=line, **at)
