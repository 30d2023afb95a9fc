"""Write the HTML page of a run, or one page that compares many; prints its path. Works while runs continue.

homodistil report runs/quickstart                      # runs/quickstart/report.html
homodistil report runs/a runs/b --out comparison.html --figures figures
homodistil report benchmarks/results/quality_main_cpu_202611.json --out quality.html
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.report import write_report
from homodistil.report.comparison import is_benchmark, write_run_comparison


def main(argv: list[str]) -> None:
    """The command `homodistil report`. Raises `UserError`."""
    arguments = parser().parse_args(argv)
    inputs = _each_once(arguments.runs)
    if len(inputs) == 1 and not is_benchmark(inputs[0]):
        print(write_report(inputs[0], arguments.out, arguments.figures))
    else:
        print(write_run_comparison(inputs, arguments.out or Path("comparison.html"), arguments.figures))


def _each_once(paths: list[Path]) -> list[Path]:
    """`paths` without repetitions: two paths to the same folder (a link, "a/../b") are one run."""
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil report`."""
    options = OneLineParser(description=__doc__.splitlines()[0])
    add = options.add_argument
    add("runs", metavar="RUN_DIR", type=Path, nargs="+", help="run folders, or JSON files of experiments/quality")
    add("--out", type=Path, help="the page (one run: RUN_DIR/report.html, many: comparison.html)")
    add("--figures", type=Path, metavar="DIR", help="export every figure as PNG and SVG into this folder")
    return options
