"""Exceptions that end a run with one line: bad input, a failed check, a stop request, a lost rank."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class _Ending(BaseException):
    """Ends a script with one line and a specific exit code (distributed/exit_codes.py), without a traceback."""

    is_said: bool | None = None
    """Whether another rank prints this line; None if this is not known."""


class UserError(_Ending, ValueError):
    """Bad input. The message is one line: the field or file, what was found, what is allowed, how to fix it.

    Launchers print it without a traceback and exit with code 2.
    """


class CheckFailed(_Ending, RuntimeError):
    """A check inside a running job failed, so that training on would spoil the model. The last checkpoint is intact.

    The message is one line that names the check and the rank, the same on every rank.
    """


class StopRequested(_Ending):
    """The job ends on request. Not an `Exception`, so that `except Exception` of any library lets it pass."""


class Interrupted(StopRequested, KeyboardInterrupt):
    """A `StopRequested` by Ctrl-C. It is a KeyboardInterrupt, too, as users of the Python API expect."""


class RankLost(_Ending, RuntimeError):
    """Another rank has died or hangs. The message is one line that names it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' with the word in `known` closest to `word`, or '' if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
