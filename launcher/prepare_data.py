"""Prepare the corpus ahead of a run. The same as `homodistil prepare-data` (homodistil/training/prepare_data.py)."""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.cli import run  # noqa: E402

if __name__ == "__main__":
    run("prepare-data", sys.argv[1:])
