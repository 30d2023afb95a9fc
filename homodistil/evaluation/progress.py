"""What a fine-tuning command is doing: a line whenever it has been silent for some seconds. No heavy imports.

    with watching("loading libraries and data"):       # in a launcher: inside, a thread watches the silence
        say("RTE: run 2 of 9: lr 0.001, seed 1")       # a line of its own
        with doing("RTE: run 2 of 9"):                 # where the command is, for the lines between
            now("epoch 1 of 3, step 40 of 234")        # what changes inside

Without `watching` (in a test, or from Python) nothing is printed by itself.
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
    """State of the process: `parts` is what it does, from the whole to the part."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.since_s = self.last_line_s = time.monotonic()
        self.is_watched = False


_state = _State()


@contextlib.contextmanager
def watching(text: str) -> Iterator[None]:
    """Inside, no silence is long. `text`: what is done outside of `doing`."""
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
    """Inside, the command does this."""
    before = (_state.parts, _state.since_s)
    _state.parts, _state.since_s = [text], time.monotonic()
    try:
        yield
    finally:
        _state.parts, _state.since_s = before


def now(text: str) -> None:
    """The part of `doing` that it has come to."""
    _state.parts = [*_state.parts[:1], text]


def line() -> str:
    """What is done now, and for how long."""
    return f"{': '.join(_state.parts)} ({time.monotonic() - _state.since_s:.0f} s)"


def _watch() -> None:
    while _state.is_watched:
        time.sleep(_LOOK_S)
        if _state.is_watched and time.monotonic() - _state.last_line_s >= SILENCE_S:
            print(f"... {line()}", file=sys.stderr, flush=True)
            _state.last_line_s = time.monotonic()
