"""Ctrl-C while a script does what needs no care: imports, planning, a report, fine-tuning whose results are files.

Where there is something to save or other ranks to tell, stop.py takes over.
"""

from __future__ import annotations

import os
import signal
import sys

from homodistil.exit_codes import of_signal
from homodistil.launch_environment import rank_before_joining


def end_on_interrupt() -> None:
    """From now on SIGINT ends this process with one line instead of a traceback; ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, _frame: object) -> None:
    if rank_before_joining() == 0:
        print("stopped by SIGINT; what was finished before is kept", file=sys.stderr, flush=True)
    # Not SystemExit: an import or a library that catches it would go on.
    os._exit(of_signal(number))
