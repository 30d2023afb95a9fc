"""Exit codes of a job, and what each of them means. Launchers pass them on: docs/reliability.md, "Stopping a job"."""

from __future__ import annotations

from homodistil.errors import CheckFailed, RankLost, StopRequested, UserError

USER_ERROR = 2
"""Bad input, or a disk or folder that cannot be written: one line says what to fix."""
STOPPED = 75
"""Stopped on request (Ctrl-C, SIGTERM, SIGUSR1) behind a checkpoint: the same command with run.resume=auto
continues."""
RANK_LOST = 76
"""A rank died or hung, one line names it; run.resume=auto resumes from the last checkpoint."""
CHECK_FAILED = 77
"""A check inside the run failed (resize gate, values that are not finite); the last checkpoint is intact."""


FAILED = 1
"""Anything else: a mistake of ours, or of a library; there is a traceback."""

_CODES = {UserError: USER_ERROR, StopRequested: STOPPED, RankLost: RANK_LOST, CheckFailed: CHECK_FAILED}


def code_of(error: BaseException) -> int:
    """The exit code that an exception ends a job with."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)


def of_signal(number: int) -> int:
    """Ended at once by signal `number`, as shells report it."""
    return 128 + number
