"""Fine-tune a checkpoint on SQuAD. The same as `homodistil squad` (homodistil/evaluation/squad/command.py)."""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.cli import run  # noqa: E402

if __name__ == "__main__":
    run("squad", sys.argv[1:])
