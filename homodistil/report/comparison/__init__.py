"""Many runs, or rows of a benchmark -> one page: models with their seeds, size-quality-speed scatter, curves, tables.

runs.py reads the folders, benchmark.py the quality study's JSON, groups.py puts seeds together, scatter.py draws,
page.py is the HTML.
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
    """The page of several run folders, finished or not, and JSON files of the quality benchmark.

    Args:
        inputs: folders are runs, files are what `experiments/quality` wrote.
        path: of the page, replaced atomically.
        figures: folder for every figure as PNG and SVG; None: none are exported.

    Raises:
        UserError: a folder is no run folder, a file no benchmark's, or something cannot be written.
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
    """The page of any rows, such as those of the quality benchmark.

    Args:
        rows: name, parameters, hidden_size, heldout_mlm_loss, masked_top1, kl_to_teacher, tokens_per_s, glue, seed, ...
            (see `groups.models`): a row per seed, or lists with a number per seed.
        curves: further figures, see `curves.curve`; may be empty.
        sources: see `page.render`.

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
    """Every figure as PNG and SVG, named by its title. Raises `OSError`."""
    for curve in curves if folder else ():
        if curve.panels:
            export(compose(curve.panels), folder, re.sub(r"[^a-z0-9]+", "-", curve.title.lower()).strip("-"))
