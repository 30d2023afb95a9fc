"""Figures of the report: thinned points, labels that do not touch, ticks of a logarithmic axis."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from homodistil.metrics.recorder import Recorder
from homodistil.report.curves import curves
from homodistil.report.figures import MAX_POINTS, MAX_TICKS, compose, log_ticks, spread, thinned, within
from homodistil.report.run import read_run


@pytest.mark.parametrize("count", [0, 1, MAX_POINTS, MAX_POINTS + 1, 7 * MAX_POINTS + 3])
def test_thinning_keeps_the_ends(count):
    points = [(i, float(i)) for i in range(count)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS and kept[:1] == points[:1] and kept[-1:] == points[-1:]
    assert len(kept) > min(count, MAX_POINTS) / 2 or count == 0
    assert kept == sorted(set(kept))


@pytest.mark.parametrize("heights", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [0.9, 0.2, 0.21, 0.25, 0.89], [0.1] * 9])
def test_labels_are_moved_apart_in_order(heights):
    placed = spread(heights, gap=0.1)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    gaps = [placed[b] - placed[a] for a, b in zip(order, order[1:], strict=False)]
    assert all(gap > 0.1 - 1e-9 for gap in gaps)
    assert sum(placed) == pytest.approx(sum(heights))  # blocks stay centred: nothing drifts up or down
    if len(heights) == 2:
        assert placed == heights


@pytest.mark.parametrize("low, high", [(0.09, 6), (1.4e-5, 30), (1e-9, 1e9), (0.3, 7), (3.0, 70), (1e-300, 1e3)])
def test_numbers_of_a_logarithmic_axis_do_not_touch(low, high):
    ticks = log_ticks(low, high)
    assert 1 < len(ticks) <= MAX_TICKS and all(low <= tick <= high for tick in ticks)
    steps = [b / a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert min(steps) > (high / low) ** (0.5 / MAX_TICKS)  # no two are much nearer than at equal distances


@pytest.mark.parametrize("num_layers", [2, 12, 24])
@pytest.mark.parametrize("slope", [0.002, 0.3])
def test_layer_numbers_stand_at_the_ends_of_their_lines(tmp_path, num_layers, slope):
    """Each inside the axes' height and apart from the others; where it had to move, a thin line leads to its end."""
    with Recorder(tmp_path, total_steps=60, start_step=0, enabled=True) as recorder:
        for step in range(10, 70, 10):
            values = {f"loss/hidden/layer.{i}": (1 + slope * i) * 2 ** (-step / 10) for i in range(num_layers)}
            recorder.log_step(step, values)
    curve = next(c for c in curves(read_run(tmp_path)) if c.title == "Terms by layer")
    figure = compose(curve.panels)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    heights = [text.xyann[1] for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(num_layers)]
    assert heights == sorted(heights) and min(heights) >= -1e-9 and max(heights) <= 1 + 1e-9
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))
    for text, line in zip(axes.texts, axes.get_lines(), strict=True):
        end = (line.get_xdata()[-1], line.get_ydata()[-1])
        assert text.xy == end
        is_moved = abs((axes.transData + axes.transAxes.inverted()).transform(end)[1] - text.xyann[1]) > 0.01
        assert (text.arrow_patch is not None) == is_moved


def test_labels_are_kept_inside():
    assert within([0.98, 1.06, 1.14], 0.08) == pytest.approx([0.84, 0.92, 1.0])
    assert within([-0.1, -0.02, 0.9], 0.08) == pytest.approx([0, 0.08, 0.9])
