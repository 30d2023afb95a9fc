"""What still fits into the time that a command has."""

from __future__ import annotations

import statistics
import time

FIRST_GUESS_S = 0.2
"""Wall seconds of a step, until some have been measured."""


class Budget:
    """Wall seconds that are left, against what jobs will take."""

    def __init__(self, minutes: float | None, workers: int) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._workers, self._step_s = workers, []

    def saw(self, results: list[dict | None], steps: int) -> None:
        self._step_s += [run["wall_s"] / steps for run in results if run and "wall_s" in run]

    def allows(self, num_runs: int, steps: int) -> bool:
        """Whether so many runs of so many steps end in time."""
        step_s = statistics.fmean(self._step_s) if self._step_s else FIRST_GUESS_S
        needed = num_runs * steps * step_s / self._workers
        return self._end is None or time.monotonic() + needed <= self._end
