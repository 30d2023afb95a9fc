"""One command in a process group of its own: how long it takes, and how much memory all its processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

_SAMPLE_S = 0.5


class Ran(NamedTuple):
    wall_s: float
    cpu_s: float
    """Of the command and the processes that it waited for."""
    peak_bytes: int
    """Largest sum over its processes of their share of resident memory (PSS: a page of n processes counts 1/n)."""
    peak_unique_bytes: int
    """The same of what is theirs alone (USS)."""


def run(command: list[str], log: Path, cwd: Path) -> Ran:
    """Run to the end.

    Raises:
        RuntimeError: the command failed; with the end of its output.
    """
    start, cpu_before = time.perf_counter(), _children_cpu_s()
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True)
    memory = _Memory(process.pid)
    try:
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        peak = memory.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Ran(time.perf_counter() - start, _children_cpu_s() - cpu_before, *peak)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Memory:
    """Samples a process and its descendants in a thread."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._is_over = pid, [0, 0], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        self._is_over.set()
        self._thread.join()
        return tuple(self._peak)

    def _watch(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            used = [0, 0]
            for process in self._processes():
                try:
                    info = process.memory_full_info()
                except psutil.Error:  # it has just ended
                    continue
                used = [used[0] + info.pss, used[1] + info.uss]
            self._peak = [max(old, new) for old, new in zip(self._peak, used, strict=True)]

    def _processes(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []
