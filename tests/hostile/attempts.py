"""Runs hostile inputs as real jobs on real ranks, some of them at the same time.

A rank other than 0 that meets a mistake before the ranks have joined waits some seconds for its launcher to end it:
while it sleeps, the next cases run.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from case import Case, Workspace
from support.fork_server import ROOT, ForkServer, Job

AHEAD = 8
"""Jobs that are started before the one whose end is waited for."""
TIMEOUT_S = 30.0


class Ending(NamedTuple):
    """How a job ended."""

    codes: list[int]
    """Exit code of each rank."""
    outputs: list[str]
    """What each rank wrote."""
    orphans: list[str]
    """Command lines of processes that a rank has left behind."""
    changed: list[str]
    """Files of the workspace that were there before, and are gone or different."""
    seconds: float


class _Started(NamedTuple):
    job: Job
    folder: Path
    files: dict[Path, str]
    start_s: float


class Attempts:
    """The jobs of `cases`, each in a workspace of its own below `folder`."""

    def __init__(self, server: ForkServer, run_inputs: Path, folder: Path, cases: list[Case]) -> None:
        self._server, self._materials, self._folder = server, run_inputs, folder
        self._waiting = list(cases)
        self._started: dict[str, _Started] = {}

    def ending(self, case: Case) -> Ending:
        """Of `case`, once it has ended. AssertionError when that takes longer than TIMEOUT_S."""
        self._waiting = [c for c in self._waiting if c.name != case.name]
        if case.name not in self._started:
            self._start(case)
        while self._waiting and len(self._started) <= AHEAD:
            self._start(self._waiting.pop(0))
        started = self._started.pop(case.name)
        codes = started.job.wait(timeout_s=TIMEOUT_S)
        seconds = time.monotonic() - started.start_s
        orphans = _left_behind(started.job.pids)
        changed = [str(path) for path, content in started.files.items() if _content(path) != content]
        outputs = [started.job.output(rank) for rank in range(len(codes))]
        return Ending(codes, outputs, orphans, changed, seconds)

    def _start(self, case: Case) -> None:
        folder = self._folder / case.name
        workspace = Workspace(folder, self._materials)
        script, *arguments = case.build(workspace)
        files = {path: _content(path) for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts}
        env = {"HOME": str(folder / "home"), "TMPDIR": str(_made(folder / "tmp")), "HF_HUB_OFFLINE": "1"}
        env |= case.env
        target = ROOT / "launcher" / f"{script}.py"
        job = self._server.start(target, arguments, num_ranks=case.ranks, env=env, cwd=_made(folder / "cwd"))
        self._started[case.name] = _Started(job, folder, files, time.monotonic())


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _content(path: Path) -> str:
    """What tells whether a file is still the same; pipes and devices are never opened."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special" if path.exists() else "gone"


def _left_behind(pids: list[int]) -> list[str]:
    """Living processes of the ranks' sessions; each rank leads its own. They are ended, so that no test meets them."""
    lines = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            is_left = os.getsid(process.pid) in pids and process.info["status"] != psutil.STATUS_ZOMBIE
        except ProcessLookupError:
            continue
        if is_left:
            lines.append(" ".join(process.info["cmdline"] or [str(process.pid)]))
            os.kill(process.pid, signal.SIGKILL)
    return lines
