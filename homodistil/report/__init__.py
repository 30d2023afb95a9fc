"""Run folder -> one self-contained HTML page: result table, curves, resize events, configuration.

run.py reads the folder (the run may still be writing it), curves.py chooses the curves and the logged values they show,
speed.py describes the speed of the run, and figures.py draws panels of lines as inline SVG. milestones.py makes the
table of a run with milestones, latency.py that of a run whose models were timed (latency_file.py reads the times),
planned.py the table of a run with a plan, and page.py the HTML. outputs.py checks where the page may be written.
comparison/ makes one page of several runs.
"""

from __future__ import annotations

from pathlib import Path

from homodistil.report.comparison import export_curves
from homodistil.report.curves import curves
from homodistil.report.latency import latency_section
from homodistil.report.milestones import family_section
from homodistil.report.outputs import check_outputs, write_page, writing_report
from homodistil.report.page import render
from homodistil.report.planned import planned_section
from homodistil.report.run import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path, path: Path | None = None, figures: Path | None = None) -> Path:
    """Write the page of one run (atomically; nothing else in its folder changes) and return its path.

    Works while the run continues: the page names the files that do not exist yet.

    Args:
        run_dir: the run folder.
        path: file of the page; None: report.html in the run folder.
        figures: folder into which every figure is exported as PNG and SVG; None: no export.

    Raises:
        UserError: `run_dir` is not a run folder, nothing in it can be read, or the page cannot be written.
    """
    check_outputs(path, figures)
    run = read_run(Path(run_dir))
    path = path or Path(run_dir) / REPORT_FILE
    check_outputs(path, None)
    sections = family_section(run.rows), latency_section(run), planned_section(run)
    page = render(run, [section for section in sections if section is not None])
    with writing_report(path):
        write_page(path, page)
        export_curves(curves(run), figures)
    return path
