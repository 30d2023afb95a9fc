"""Several runs, or rows of a benchmark -> one page: models with seeds, size-quality-speed scatter, curves, tables.

runs.py reads the run folders, benchmark.py the JSON of the quality study; groups.py combines seeds to models,
scatter.py draws them, and page.py makes the HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from homodistil.report.comparison.benchmark import is_benchmark, read_benchmark
from homodistil.report.comparison.groups import models
from homodistil.report.comparison.page import render
from homodistil.report.comparison.runs import read_entries, run_curves
from homodistil.report.comparison.scatter import scatter
from homodistil.report.curves import Curve
from homodistil.report.figures import compose, export
from homodistil.report.outputs import check_outputs, write_page, writing_report


def write_run_comparison(inputs: Sequence[Path], path: Path, figures: Path | None = None) -> Path:
    """Write the page that compares several runs, finished or not, and results of the quality benchmark.

    Args:
        inputs: run folders, and JSON files that `experiments/quality` wrote.
        path: file of the page, replaced atomically.
        figures: folder into which every figure is exported as PNG and SVG; None: no export.

    Returns:
        `path`.

    Raises:
        UserError: a folder is not a run folder, a file is not of the benchmark, or something cannot be written.
    """
    check_outputs(path, figures)
    files = [file for file in inputs if is_benchmark(file)]
    entries = read_entries([folder for folder in inputs if folder not in files])
    sources = [(str(entry.run.folder), row) for entry in entries for row in entry.found]
    rows = [row for entry in entries for row in entry.rows] + [row for file in files for row in read_benchmark(file)]
    notes = [f"{entry.run.folder}: {'; '.join(entry.notes)}." for entry in entries if entry.notes]
    title = ", ".join([f"{len(entries)} run{'s'[: len(entries) != 1]}"] * bool(entries) + [file.stem for file in files])
    return write_comparison(rows, run_curves(entries), path, title, notes, sources, figures)


def write_comparison(
    rows: Sequence[Mapping[str, Any]],
    curves: Sequence[Curve],
    path: Path,
    title: str = "Comparison",
    notes: Sequence[str] = (),
    sources: Sequence[tuple[str, Mapping[str, Any]]] = (),
    figures: Path | None = None,
) -> Path:
    """Write the page of any rows, such as those of the quality benchmark.

    Args:
        rows: name, parameters, hidden_size, heldout_mlm_loss, masked_top1, kl_to_teacher, tokens_per_s, glue, seed, ...
            (see `groups.models`): one row per seed, or lists with one number per seed.
        curves: further figures, see `curves.curve`; may be empty.
        notes, sources: see `page.render`.

    Returns:
        `path`.

    Raises:
        UserError: page or figures cannot be written.
    """
    compared = models(rows)
    points = scatter(compared)
    with writing_report(path):
        write_page(path, render(title, compared, points, curves, notes, sources))
        if figures and points:
            export(points, figures, "size-quality-speed")
        export_curves(curves, figures)
    return path


def export_curves(curves: Sequence[Curve], folder: Path | None) -> None:
    """Write every figure as PNG and SVG, named after its title; nothing if `folder` is None. Raises `OSError`."""
    for curve in curves if folder else ():
        if curve.panels:
            export(compose(curve.panels), folder, re.sub(r"[^a-z0-9]+", "-", curve.title.lower()).strip("-"))
