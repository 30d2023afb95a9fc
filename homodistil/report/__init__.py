"""Run folder -> one self-contained HTML page: result table, curves, resize events, configuration.

run.py reads the folder (it may still be growing), curves.py says which curves tell the story and from which values,
figures.py draws panels of lines as inline SVG, page.py is the HTML.
"""

from __future__ import annotations

from pathlib import Path

from homodistil.errors import writing
from homodistil.metrics import write_atomically
from homodistil.report.page import render
from homodistil.report.run import read_run

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder (atomically, nothing else changes) and return its path.

    Works while the run goes on: what is not there yet is named on the page. Raises `UserError` for a folder that
    is not a run folder.
    """
    path = Path(run_dir) / REPORT_FILE
    page = render(read_run(Path(run_dir)))
    with writing(path):
        write_atomically(path, page)
    return path
