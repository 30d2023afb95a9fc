"""What the start of a job took, part by part: one line of rank 0, before the first step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from homodistil.engine.ds_config import zero_stage


class StartReport:
    """Seconds of the parts of a start, in their order. The first one, up to here, is Python's and the libraries'."""

    def __init__(self) -> None:
        self._parts_s = {"launch and imports": _age_s()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self._parts_s[name] = time.perf_counter() - start_s

    def line(self, num_ranks: int, num_machines: int, engine_config: dict) -> str:
        """Args: engine_config: from `resolve_engine_config`."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._parts_s.items())
        ranks, machines = _counted(num_ranks, "rank"), _counted(num_machines, "machine")
        layout = f"{ranks} on {machines}, ZeRO-{zero_stage(engine_config)}"
        return f"start: {layout}; {parts}; {sum(self._parts_s.values()):.1f} s in all"


def _age_s() -> float:
    """Since this process began, by the clock since boot: the wall clock may jump. proc(5): field 22, in ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
