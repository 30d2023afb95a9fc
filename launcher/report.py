"""Write the HTML page of a run, or one that compares many. The same as `homodistil report`."""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.cli import run  # noqa: E402

if __name__ == "__main__":
    run("report", sys.argv[1:])
