"""Progress of this rank, reported by its main thread. Read by the watching thread (watchdog.py) every second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Report(NamedTuple):
    count: int
    """Reports made so far: comparable between ranks, because all make the same ones in the same order."""
    step: int
    phase: str
    at_s: float
    """time.monotonic()"""
    is_long: bool = False


TRAINING = "training"
_last = Report(0, 0, "starting", time.monotonic())
_has_trained = False


def last() -> Report:
    return _last


def progress(step: int, phase: str) -> None:
    """This rank has come so far. Every rank reports the same sequence; costs nothing."""
    global _has_trained
    _has_trained = _has_trained or phase == TRAINING
    _set(step, phase)


def has_trained() -> bool:
    """Whether this process has finished a training step, so that there may be something to resume from."""
    return _has_trained


def each(phase: str, items: Iterable[T]) -> Iterator[T]:
    """`items`, with a report for each; every rank has equally many."""
    for item in items:
        _set(_last.step, phase)
        yield item


@contextlib.contextmanager
def long_phase(phase: str) -> Iterator[None]:
    """However long this takes, nobody is called stuck: not this rank, nor those that wait for it. No others inside."""
    before = _last
    _set(before.step, phase, is_long=True)
    try:
        yield
    except BaseException:
        _set(before.step, phase)  # what was being done when it happened
        raise
    _set(before.step, before.phase)


def _set(step: int, phase: str, is_long: bool = False) -> None:
    global _last  # one assignment of a whole tuple: the reading thread never sees half a report
    _last = Report(_last.count + 1, step, phase, time.monotonic(), is_long)
