"""Write the HTML report of a run folder: python launcher/report.py RUN_DIR. Prints the path of the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from homodistil.errors import UserError
from homodistil.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write RUN_DIR/report.html; works while the run goes on.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder, such as runs/quickstart")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
