"""Progress of a fine-tuning command: prints a line after every few seconds without output. Imports nothing slow.

    with watching("loading libraries and data"):       # in the command: starts the thread that prints
        say("RTE: run 2 of 9: lr 0.001, seed 1")       # prints this line now
        with doing("RTE: run 2 of 9"):                 # the current task, for the lines of the thread
            now("epoch 1 of 3, step 40 of 234")        # the current part of this task

Without `watching` (in a test, or from Python) only `say` prints.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

SILENCE_S = 4.0
_LOOK_S = 0.5


class _State:
    """State of the process: `parts` are the current task and, behind it, the current part of the task."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.since_s = self.last_line_s = time.monotonic()
        self.is_watched = False


_state = _State()


@contextlib.contextmanager
def watching(text: str) -> Iterator[None]:
    """Inside this context, print a line after every `SILENCE_S` without output.

    Args:
        text: the current task outside of any `doing`.
    """
    _state.is_watched, _state.last_line_s = True, time.monotonic()
    threading.Thread(target=_watch, name="progress", daemon=True).start()
    try:
        with doing(text):
            yield
    finally:
        _state.is_watched = False


def say(line: str) -> None:
    """Print a line to standard output."""
    print(line, flush=True)
    _state.last_line_s = time.monotonic()


@contextlib.contextmanager
def doing(text: str) -> Iterator[None]:
    """Inside this context, `text` is the current task."""
    before = (_state.parts, _state.since_s)
    _state.parts, _state.since_s = [text], time.monotonic()
    try:
        yield
    finally:
        _state.parts, _state.since_s = before


def now(text: str) -> None:
    """Set the current part of the task."""
    _state.parts = [*_state.parts[:1], text]


def line() -> str:
    """The current task and part, and the seconds since the task began."""
    return f"{': '.join(_state.parts)} ({time.monotonic() - _state.since_s:.0f} s)"


def _watch() -> None:
    while _state.is_watched:
        time.sleep(_LOOK_S)
        if _state.is_watched and time.monotonic() - _state.last_line_s >= SILENCE_S:
            print(f"... {line()}", file=sys.stderr, flush=True)
            _state.last_line_s = time.monotonic()
