"""Sentences on the speed and memory of a run: medians of the logged intervals at each width."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from homodistil.report.run import Run

Lines = Sequence[dict[str, Any]]

_BUSY_SPREAD = 0.2
"""Intervals at one width do the same work. If the interquartile range of their speeds is larger than this share of the
median, another process was using the machine."""
_FEWEST_INTERVALS = 8  # with fewer intervals the spread means nothing
_RISE = 1.05  # smaller rises of the memory are not mentioned


def speed_sentences(run: Run) -> list[str]:
    """Speed at the first and the last logged width, and whether the machine was busy; [] if nothing was logged."""
    stretches = _stretches(run.train)
    if not stretches:
        return []
    first, last = stretches[0], stretches[-1]
    if len(stretches) == 1:
        return [f"Training speed: {_speed(run, first)}.", *_busy([first])]
    return [f"Training speed: {_speed(run, first)}, and {_speed(run, last)}.", *_busy([first, last])]


def memory_sentences(run: Run) -> list[str]:
    """One sentence for each kind of memory that grew although the student became narrower."""
    kinds = {"memory/rss_bytes": "Resident memory", "memory/accelerator_bytes": "Peak memory on the accelerator"}
    return [text for name, label in kinds.items() if (text := _growth(run.train, name, label))]


def _stretches(train: Lines) -> list[list[dict[str, Any]]]:
    """Logged intervals that have a speed: one list per set of widths, in the order of training."""
    timed = [line for line in train if line.get("speed/tokens_per_s") and "widths/hidden" in line]
    return [list(lines) for _, lines in groupby(timed, key=_widths)]


def _widths(line: dict[str, Any]) -> tuple:
    return tuple((name, value) for name, value in line.items() if name.startswith("widths/"))


def _rates(lines: Lines) -> list[float]:
    """Tokens/s of the intervals, without the first one if there are more.

    The first interval may have begun at a larger width, or includes the warm-up of the machine.
    """
    rates = [line["speed/tokens_per_s"] for line in lines]
    return rates[1:] or rates


def _speed(run: Run, lines: Lines) -> str:
    rates = _rates(lines)
    tokens = statistics.median(rates)
    steps = f"{tokens / run.tokens_per_step:,.3g} steps/s ({tokens:,.0f} tokens/s)" if run.tokens_per_step else ""
    counted = f"median of {len(rates)} logged intervals" if len(rates) > 1 else "one logged interval"
    return f"{steps or f'{tokens:,.0f} tokens/s'} at hidden size {_hidden(lines[0])} ({counted})"


def _hidden(line: dict[str, Any]) -> str:
    value = line.get("widths/hidden")
    return "unknown" if value is None else f"{value:,.0f}"


def _busy(stretches: Sequence[Lines]) -> list[str]:
    """One sentence if the times of intervals with equal work differ strongly, else none."""
    for lines in stretches:
        rates = _rates(lines)
        if len(rates) < _FEWEST_INTERVALS:
            continue
        low, median, high = statistics.quantiles(rates, n=4)
        if high - low > _BUSY_SPREAD * median:
            return [
                f"The machine was busy with something else as well: at hidden size {_hidden(lines[0])} the middle half "
                f"of the intervals, all with the same work, went from {low:,.0f} to {high:,.0f} tokens/s. These speeds "
                f"cannot be compared well with those of other runs."
            ]
    return []


def _growth(train: Lines, name: str, label: str) -> str:
    """Sentence on the rise from the first logged value to the highest one at a smaller size; "" if there is none."""
    lines = [line for line in train if line.get(name) and line.get("model/parameters")]
    narrower = [line for line in lines if line["model/parameters"] < lines[0]["model/parameters"]]
    if not narrower:
        return ""
    first, peak = lines[0], max(narrower, key=lambda line: line[name])
    if peak[name] <= _RISE * first[name]:
        return ""
    return (
        f"{label} of the first rank rose from {_mib(first[name])} (step {first['step']:,}, hidden size "
        f"{_hidden(first)}) to {_mib(peak[name])} (step {peak['step']:,}, hidden size {_hidden(peak)}), although the "
        f"student became narrower."
    )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
