"""The heartbeat that a rank sends every second, and its description for messages."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from homodistil.distributed.watchdog import reports

_PACKAGE = str(Path(__file__).parents[2])
_WATCH = str(Path(__file__).parent)
_COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))


class Heartbeat(NamedTuple):
    beat: int
    """Number of this heartbeat."""
    host: str
    namespace: int
    """Inode of the PID namespace: equal PIDs mean the same process only if host and namespace are equal."""
    pid: int
    count: int
    """Reports made so far; this and the following three fields are those of `reports.Report`."""
    step: int
    phase: str
    is_long: bool
    idle_s: float
    """Seconds since the last report."""
    where: str
    """Innermost line of this package on the stack of the main thread."""
    waits: bool
    """Whether the main thread is in a collective."""
    end: tuple[int, str] | None
    """(exit code, reason) once the rank has ended by itself, (0, "") on success; None before."""

    def encode(self) -> str:
        return json.dumps(self)

    @classmethod
    def decode(cls, text: bytes) -> Heartbeat:
        *values, end = json.loads(text)
        return cls(*values, tuple(end) if end else None)

    def name(self, rank: int) -> str:
        return f"rank {rank} (host {self.host}, pid {self.pid})"

    def doing(self) -> str:
        at = f" at {self.where}" if self.where else ""
        return f"step {self.step}, {self.phase}{at}"


def local_heartbeat(beat: int, end: tuple[int, str] | None) -> Heartbeat:
    """The current heartbeat of this process. Called by the thread of the watchdog."""
    report = reports.last()
    where, waits = _main_thread()
    idle_s = time.monotonic() - report.at_s
    place = (socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino, os.getpid())
    return Heartbeat(beat, *place, report.count, report.step, report.phase, report.is_long, idle_s, where, waits, end)


def _main_thread() -> tuple[str, bool]:
    """(innermost line of this package, whether a collective is on the stack above it)."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    where, waits = "", False
    while frame is not None and not where:
        path = frame.f_code.co_filename
        waits = waits or any(part in path for part in _COLLECTIVES)
        if path.startswith(_PACKAGE) and not path.startswith(_WATCH):
            where = f"homodistil{path.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return where, waits
