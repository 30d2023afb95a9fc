"""What a run can end with: a mistake that the user can fix, or a check inside the run that failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class _Ending(BaseException):
    """Ends a script with one line and an exit code of its own (distributed/exit_codes.py), without a traceback."""

    is_said: bool | None = None
    """Another rank prints this line; None while nothing is known of other ranks."""


class UserError(_Ending, ValueError):
    """Bad input. The text is one line: the field or file, what was found, what is allowed, how to fix it.

    Launchers print it without a traceback and exit with code 2.
    """


class CheckFailed(_Ending, RuntimeError):
    """A check inside a running job failed: resuming would spoil the model. The last checkpoint is intact.

    The text is one line that names the check and the rank. The same on every rank.
    """


class StopRequested(_Ending):
    """The job ends because it was asked to. No `Exception`: nothing that repairs or retries may swallow it."""


class Interrupted(StopRequested, KeyboardInterrupt):
    """Ctrl-C. A caller of job.run sees what it knows; in a script it is a `StopRequested` like any other."""


class RankLost(_Ending, RuntimeError):
    """Another rank is gone or hangs. The text is one line that names it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
