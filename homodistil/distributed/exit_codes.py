"""Exit codes of a job and their meaning. Launchers pass them on; see docs/reliability.md, "Stopping a job"."""

from __future__ import annotations

from homodistil.errors import CheckFailed, RankLost, StopRequested, UserError

USER_ERROR = 2
"""Bad input, or a disk or folder that cannot be written; one line says how to fix it."""
STOPPED = 75
"""Stopped on request (Ctrl-C, SIGTERM, SIGUSR1) after a checkpoint; the same command with run.resume=auto continues."""
RANK_LOST = 76
"""A rank died or hangs, and one line names it; run.resume=auto resumes from the last checkpoint."""
CHECK_FAILED = 77
"""A check inside the run failed (resize verification, values that are not finite); the last checkpoint is intact."""


FAILED = 1
"""Any other error, which is a bug of this package or a library; there is a traceback."""

_CODES = {UserError: USER_ERROR, StopRequested: STOPPED, RankLost: RANK_LOST, CheckFailed: CHECK_FAILED}


def code_of(error: BaseException) -> int:
    """The exit code of a job that ends with `error`."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)


def of_signal(number: int) -> int:
    """The exit code of a process that signal `number` ended, as shells report it."""
    return 128 + number
