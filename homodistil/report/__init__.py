"""Run folder -> one self-contained HTML page: result table, curves, resize events, configuration. Many: comparison/.

run.py reads the folder (it may still be growing), curves.py says which curves tell the story and from which values,
figures.py draws panels of lines as inline SVG, family.py is the table of a run with milestones, planned.py of one that
was planned, page.py is the HTML.
"""

from __future__ import annotations

from pathlib import Path

from homodistil.errors import writing
from homodistil.metrics import write_atomically
from homodistil.report.comparison import export_curves
from homodistil.report.curves import curves
from homodistil.report.family import family_section
from homodistil.report.page import render
from homodistil.report.planned import planned_section
from homodistil.report.run import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path, path: Path | None = None, figures: Path | None = None) -> Path:
    """Write the page of one run (atomically; nothing else in its folder changes) and return its path.

    Works while the run goes on: what is not there yet is named on the page.

    Args:
        path: of the page; None: report.html in the run folder.
        figures: folder for every figure as PNG and SVG; None: none are exported.

    Raises:
        UserError: not a run folder, a file of it cannot be read, or the page cannot be written.
    """
    run = read_run(Path(run_dir))
    path = path or Path(run_dir) / REPORT_FILE
    page = render(run, family_section(run.rows), planned_section(run))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
        export_curves(curves(run), figures)
    return path
