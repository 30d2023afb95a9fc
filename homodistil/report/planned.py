"""Planned and measured speed and memory of a run, for each phase of constant width."""

from __future__ import annotations

import json
import statistics
from typing import Any

from homodistil.metrics.result_table import DASH, PLAN_FILE
from homodistil.report.page import TableSection
from homodistil.report.run import Run, clean

HEADINGS = ["hidden size", "steps", "tokens/s planned", "measured", "difference"]
HEADINGS += ["MB per rank planned", "measured", "difference"]
_MOST_ROWS = 8


def planned_section(run: Run) -> TableSection | None:
    """The section that compares plan.json with the log; None without plan.json or before anything was logged.

    If plan.json cannot be read, a note is added to `run.notes`.
    """
    path = run.folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        plan = clean(json.loads(path.read_text(encoding="utf-8")))
        rows = [row for stretch in _some(plan["stretches"], run) if (row := _row(stretch, run.train))]
        caption = f"Plan: {plan['basis']}."
        return TableSection("Planned and measured", HEADINGS, rows, caption, has_names=False) if rows else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        run.notes.append(f"{PLAN_FILE}: cannot be read ({type(error).__name__})")
        return None


def _some(stretches: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Phases with logged steps, in order; only the longest ones if there are many."""
    seen = [stretch for stretch in stretches if _lines(stretch, run.train)]
    longest = sorted(seen, key=lambda stretch: -stretch["num_steps"])[:_MOST_ROWS]
    return sorted(longest, key=lambda stretch: stretch["first_step"])


def _lines(stretch: dict[str, Any], train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = stretch["first_step"]
    return [line for line in train if first < line["step"] <= first + stretch["num_steps"]]


def _row(stretch: dict[str, Any], train: list[dict[str, Any]]) -> list[str] | None:
    lines = _lines(stretch, train)
    speeds = [line["speed/tokens_per_s"] for line in lines if line.get("speed/tokens_per_s")]
    sizes = [line.get("memory/accelerator_bytes") or line.get("memory/rss_bytes") or 0 for line in lines]
    row = [f"{stretch['hidden_size']}", f"{stretch['num_steps']:,}"]
    row += _compared(stretch["tokens_per_s"], statistics.median(speeds) if speeds else None, 1.0)
    return row + _compared(stretch["total_bytes"], max(sizes) or None, 1e-6)


def _compared(planned: float, measured: float | None, unit: float) -> list[str]:
    if measured is None:
        return [f"{planned * unit:,.0f}", DASH, DASH]
    return [f"{planned * unit:,.0f}", f"{measured * unit:,.0f}", f"{measured / planned - 1:+.0%}"]
