"""A tracker behind a network, in a thread: it neither ends nor slows the training that it is told of."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping

from tqdm import tqdm

from homodistil.metrics.trackers.tracker import Tracker

FINISH_S = 30.0
"""Seconds that the end of a run waits for a tracker to take what it has not taken yet."""
MAX_WAITING = 5_000
"""Logged lines that may wait for a tracker: some 100 MB of values for a model of 24 layers."""


class BackgroundTracker:
    """Hands every call to a thread. What fails there turns the tracker off with one warning.

    Args:
        name: of the tracker, as in run.trackers.
        begin: makes the tracker; it is called in the thread, too, because it may wait for a server.
    """

    def __init__(self, name: str, begin: Callable[[], Tracker]) -> None:
        self._name, self._begin, self._is_off = name, begin, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_WAITING)
        # A daemon: a server that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.log(step, values))

    def finish(self, result: Mapping[str, float] | None) -> None:
        """Wait until everything is taken, but no longer than `FINISH_S`."""
        self._put(lambda tracker: tracker.finish(result))
        self._put(None)
        if not self._is_off:
            self._thread.join(FINISH_S)
            if self._thread.is_alive():
                self._turn_off(f"it has not taken everything within {FINISH_S:.0f} s")

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._is_off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._turn_off(f"{MAX_WAITING} lines wait for it")

    def _work(self) -> None:
        try:
            tracker = self._begin()
            while (call := self._calls.get()) is not None and not self._is_off:
                call(tracker)
        except Exception as error:  # whatever a client raises: of its own, of its network library, of the system
            self._turn_off(one_line(error))

    def _turn_off(self, reason: str) -> None:
        if not self._is_off:
            self._is_off = True
            warn_off(self._name, reason)


def one_line(error: Exception) -> str:
    """An exception as the reason in a warning."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def warn_off(name: str, reason: str) -> None:
    """Say that the tracker `name` is off; above a progress bar, where there is one."""
    what = f"{name} is off for the rest of this run ({reason})"
    tqdm.write(f"warning: run.trackers: {what}; training goes on, and metrics.jsonl has every value", file=sys.stderr)
    sys.stderr.flush()
