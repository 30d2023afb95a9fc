"""Progress reports of the main thread of this rank, which the thread of watchdog.py reads every second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Report(NamedTuple):
    count: int
    """Reports made so far; comparable between ranks, because all make the same reports in the same order."""
    step: int
    phase: str
    at_s: float
    """Time of the report (time.monotonic())."""
    is_long: bool = False


TRAINING = "training"
_last = Report(0, 0, "starting", time.monotonic())
_has_trained = False


def last() -> Report:
    """The last report of this rank."""
    return _last


def progress(step: int, phase: str) -> None:
    """Report the progress of this rank. Every rank must report the same sequence; a report costs almost nothing."""
    global _has_trained
    _has_trained = _has_trained or phase == TRAINING
    _set(step, phase)


def has_trained() -> bool:
    """Whether this process has finished a training step, so that there may be something to resume from."""
    return _has_trained


def each(phase: str, items: Iterable[T]) -> Iterator[T]:
    """Iterate over `items` with one report per item; every rank must have the same number of items."""
    for item in items:
        _set(_last.step, phase)
        yield item


@contextlib.contextmanager
def long_phase(phase: str) -> Iterator[None]:
    """Inside this context no rank counts as stuck, neither this one nor those that wait for it. Must not be nested."""
    before = _last
    _set(before.step, phase, is_long=True)
    try:
        yield
    except BaseException:
        _set(before.step, phase)  # the phase in which the exception was raised
        raise
    _set(before.step, before.phase)


def _set(step: int, phase: str, is_long: bool = False) -> None:
    global _last  # assigned as one tuple, so that the reading thread never sees a partial report
    _last = Report(_last.count + 1, step, phase, time.monotonic(), is_long)
