"""Ends a script with one line and an exit code, whatever the error.

    with exit_with_code():
        ...

If several ranks fail with the same error, the watchdog decides which rank prints it; before the watchdog runs, rank 0
does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

from homodistil.distributed.exit_codes import code_of
from homodistil.distributed.launcher_env import rank_before_joining
from homodistil.errors import CheckFailed, RankLost, StopRequested, UserError

# Long enough for a launcher to end all other ranks once rank 0 has reported the same error.
OTHER_RANKS_WAIT_S = 5.0
MESSAGE_CHARS = 300
"""Longer messages of unexpected errors are cut on the line; the file with the traceback has the whole text."""


@contextlib.contextmanager
def exit_with_code() -> Iterator[None]:
    """End the process with one line and an exit code (exit_codes.py) if an exception is raised inside this context.

    For an unexpected exception the line also says where the traceback is.
    """
    try:
        yield
    except (UserError, CheckFailed, RankLost, StopRequested) as error:
        _say(error)
        _leave(code_of(error))
    except Exception as error:
        place = _traceback_place()
        _say(error, f"{_unforeseen(error)}; the traceback is {place}")
        _leave(code_of(error))


def _say(error: BaseException, text: str | None = None) -> None:
    """Print the error, unless another rank prints the same one.

    The watchdog has decided which rank prints (`error.is_said`). Before it runs, all ranks except 0 wait first, so that
    the launcher can end them.

    Args:
        text: the line to print; None: the message of the error.
    """
    rank, is_said = rank_before_joining(), getattr(error, "is_said", None)
    if is_said is None and rank:
        time.sleep(OTHER_RANKS_WAIT_S)
    if not is_said:
        kind, text = "" if isinstance(error, StopRequested) else "error: ", text or str(error)
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not prevent the line
            sys.stdout.flush()  # earlier output must appear before the error
        print(f"{kind}{text}" if rank == 0 else f"{kind}rank {rank}: {text}", file=sys.stderr, flush=True)


def _unforeseen(error: Exception) -> str:
    """One line on an unexpected error. The watchdog, if it runs, knows the current task of this rank."""
    reports = sys.modules.get("homodistil.distributed.watchdog.reports")
    doing = f"while {reports.last().phase}" if reports else "at the start"
    text = " ".join(str(error).split())[:MESSAGE_CHARS]
    return f"failed {doing}: {type(error).__name__}{f': {text}' if text else ''}"


def _traceback_place() -> str:
    """Write the traceback of the current exception, and return where it is, as the end of a sentence.

    After training has begun it goes into the log of the job, because the disk of a machine may be lost after the job.
    """
    reports = sys.modules.get("homodistil.distributed.watchdog.reports")
    if reports and reports.has_trained():
        traceback.print_exc()
        return "above"
    rank, host = rank_before_joining(), socket.gethostname()
    try:
        handle, path = tempfile.mkstemp(prefix=f"homodistil-error-rank-{rank}-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{shlex.join(sys.argv)}\n\n{traceback.format_exc()}")
    except OSError:  # there is no writable temporary folder
        traceback.print_exc()
        return "above"
    return f"in {path} on {host}"


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: while other ranks are inside a collective, the process group can block the interpreter's shutdown.
    os._exit(code)
