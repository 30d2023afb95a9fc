"""What a run can end with: a mistake that the user can mend, or a check inside the run that failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The text is one line: the field or file, what was found, what is allowed, how to mend it.

    Launchers print it without a traceback and exit with code 2.
    """


class CheckFailed(RuntimeError):
    """A check inside a running job failed: going on would spoil the model. The last checkpoint is intact.

    The text is one line that names the check and the rank. The same on every rank.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
