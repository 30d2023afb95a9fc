"""How a script ends: one line and an exit code, whatever happened.

    with exit_with_code():
        ...

Several ranks may meet the same mistake: the watch tells who prints it, and, before there is one, rank 0 comes first.
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

# Long enough for a launcher to end the other ranks once rank 0 has reported the same mistake.
OTHER_RANKS_WAIT_S = 5.0
MESSAGE_CHARS = 300
"""Longest message of an unforeseen error; its file has the whole text."""


@contextlib.contextmanager
def exit_with_code() -> Iterator[None]:
    """Turn what a script ends with into one line and an exit code (exit_codes.py).

    What nobody foresaw ends with one line as well, which says where the traceback is.
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
    """One rank prints what all of them ran into: the watch tells who, or, before there is one, rank 0 comes first.

    Args:
        text: what to print, on one line (default: the error itself).
    """
    rank, is_said = rank_before_joining(), getattr(error, "is_said", None)
    if is_said is None and rank:
        time.sleep(OTHER_RANKS_WAIT_S)
    if not is_said:
        kind, text = "" if isinstance(error, StopRequested) else "error: ", text or str(error)
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone must not cost the line
            sys.stdout.flush()  # what was printed before must not come out behind the error
        print(f"{kind}{text}" if rank == 0 else f"{kind}rank {rank}: {text}", file=sys.stderr, flush=True)


def _unforeseen(error: Exception) -> str:
    """What failed, in one line. The watch, where it runs, knows what this rank was doing."""
    reports = sys.modules.get("homodistil.distributed.watchdog.reports")
    doing = f"while {reports.last().phase}" if reports else "at the start"
    text = " ".join(str(error).split())[:MESSAGE_CHARS]
    return f"failed {doing}: {type(error).__name__}{f': {text}' if text else ''}"


def _traceback_place() -> str:
    """Where the traceback of the exception that is being handled has been written to.

    In training it belongs into the job's log, which is all that is left of a machine that is given back.
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
    except OSError:  # not even a temporary folder: then it is better here than lost
        traceback.print_exc()
        return "above"
    return f"in {path} on {host}"


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group whose peers are still inside a collective can block interpreter shutdown.
    os._exit(code)
