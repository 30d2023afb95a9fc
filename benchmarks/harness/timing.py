"""How an operation is timed, how its memory is taken, and what the machine could do."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

import torch

from benchmarks.harness.memory_counters import memory_in_use, peak_memory, start_peak
from benchmarks.harness.workload import synchronize

WARMUP_RUNS = 3
MIN_RUNS = {"cuda": 20, "cpu": 3}
MAX_RUNS = 50
FLUSH_BYTES = 256 * 2**20
"""Written before every timed run on a GPU: more than any L2 cache, so that inputs come from memory as in a step."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's mallopt."""

Run = Callable[[], object]


def interleaved_ms(runs: dict[str, Run], device: torch.device, budget_s: float) -> dict[str, list[float]]:
    """Milliseconds of each variant, run by turns (A B C A B C), for about `budget_s` seconds."""
    for run in runs.values():
        for _ in range(WARMUP_RUNS if device.type == "cuda" else 1):
            run()
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_RUNS[device.type] or (time.perf_counter() - start < budget_s and rounds < MAX_RUNS):
        for name, run in runs.items():
            clock.time(name, run)
        rounds += 1
    return clock.milliseconds()


class _CpuClock:
    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def time(self, name: str, run: Run) -> None:
        start = time.perf_counter()
        run()
        self._found.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    def milliseconds(self) -> dict[str, list[float]]:
        return self._found


class _CudaClock:
    """CUDA events around each run, read once at the end: the queue never runs dry."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def time(self, name: str, run: Run) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        before.record()
        run()
        after.record()
        self._events.setdefault(name, []).append((before, after))

    def milliseconds(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) for a, b in events] for name, events in self._events.items()}


def strict_allocator() -> None:
    """From here on glibc gives freed memory back at once: slower, but the resident set is what is in use."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 65536)
    libc.mallopt(TRIM_THRESHOLD, 0)


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes that one run needs beyond what was there before it. On the CPU call `strict_allocator` first."""
    run()  # what is made once: thread pools, workspaces
    gc.collect()
    synchronize(device)
    before = memory_in_use(device)
    start_peak(device)
    run()
    synchronize(device)
    return max(0, peak_memory(device) - before)


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by a large copy: the memory's own rate."""
    source = torch.ones((2**30 if device.type == "cuda" else 2**27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source)}
    return 2 * source.numel() / (min(interleaved_ms(runs, device, 0.3)["copy"]) / 1e3)
