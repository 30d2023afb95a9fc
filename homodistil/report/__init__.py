"""Run folder -> one self-contained HTML page: result table, curves, resize events, configuration. Many: comparison/.

run.py reads the folder (it may still be growing), curves.py says which curves tell the story and from which values,
speed.py how fast the run was, figures.py draws panels of lines as inline SVG, milestones.py is the table of a run with
milestones, planned.py of one that was planned, page.py is the HTML; outputs.py checks where it may be written.
"""

from __future__ import annotations

from pathlib import Path

from homodistil.report.comparison import export_curves
from homodistil.report.curves import curves
from homodistil.report.milestones import family_section
from homodistil.report.outputs import check_outputs, write_page, writing_report
from homodistil.report.page import render
from homodistil.report.planned import planned_section
from homodistil.report.run import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path, path: Path | None = None, figures: Path | None = None) -> Path:
    """Write the page of one run (atomically; nothing else in its folder changes) and return its path.

    Works while the run continues: what is not there yet is named on the page.

    Args:
        path: of the page; None: report.html in the run folder.
        figures: folder for every figure as PNG and SVG; None: none are exported.

    Raises:
        UserError: not a run folder, nothing in it can be read, or the page cannot be written.
    """
    check_outputs(path, figures)
    run = read_run(Path(run_dir))
    path = path or Path(run_dir) / REPORT_FILE
    check_outputs(path, None)
    planned = planned_section(run)
    page = render(run, family_section(run.rows), planned)
    with writing_report(path):
        write_page(path, page)
        export_curves(curves(run), figures)
    return path
