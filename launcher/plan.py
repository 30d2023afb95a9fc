"""What a run will take, before it is started. The same as `homodistil plan`; see docs/planning.md."""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.cli import run  # noqa: E402

if __name__ == "__main__":
    run("plan", sys.argv[1:])
