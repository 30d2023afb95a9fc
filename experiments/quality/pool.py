"""Worker processes and the queue they take jobs from; progress with the time that is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from experiments.quality.jobs import Job
from experiments.quality.statistics import choice_loss
from experiments.quality.worker import work_off

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Process(Protocol):
    """What is asked of a worker's process (`multiprocessing.Process` has it)."""

    exitcode: int | None

    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[Connection, int], Process]
"""Starts worker number i, which answers on the connection as `worker.work_off` does."""


def spawner(work: Path, engine_json: Path) -> Start:
    """Real workers: processes of their own with one thread each; what they print goes to `work`/worker-N.log."""

    def start(connection: Connection, number: int) -> Process:
        os.environ.update(_ENVIRONMENT)  # before the child imports torch
        arguments = (connection, work, engine_json, work / f"worker-{number}.log")
        process = multiprocessing.get_context("spawn").Process(target=work_off, args=arguments, daemon=True)
        process.start()
        return process

    return start


class Worker:
    """A process that does one job at a time; begun with its first job, and anew after a failure."""

    def __init__(self, start: Start, number: int) -> None:
        self._start, self._number = start, number
        self.connection: Connection | None = None
        self.process: Process | None = None
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        if self.process is None:
            self.connection, theirs = multiprocessing.Pipe()
            self.process = self._start(theirs, self._number)
            theirs.close()
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it has died since: `answer` says so
            self.connection.send(job)

    def answer(self) -> tuple[dict | None, str | None, float]:
        """Of the job it was given, once `connection` is ready; a process that died is an error too."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = (None, f"the worker died with exit code {self.process.exitcode}", 0.0)
        if answer[1] is not None:
            self.end()
        self.job = None
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.join(timeout=5)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process = None


class Pool:
    """Does jobs and keeps their results in `work`.

    Args:
        work: folder of results; what is there already is not made again.
        start: see `spawner`.
        num_workers: processes; 0: no job is run, and the result of one that has not been run is None.
        say: gets the progress lines.
    """

    def __init__(self, work: Path, start: Start, num_workers: int, say: Callable[[str], None] = print) -> None:
        self.work, self.say = work, say
        self.errors: dict[str, str] = {}
        """Label -> error of jobs that failed under this command."""
        self._seconds: dict[str, list[float]] = {}
        work.mkdir(parents=True, exist_ok=True)
        self._workers = [Worker(start, number) for number in range(num_workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self._workers:
            if worker.job is not None and worker.process is not None:
                worker.process.kill()  # its half-made run is made anew next time
            worker.end()

    def run(self, phase: str, jobs: Sequence[Job], later: dict[str, int] | None = None) -> list[dict | None]:
        """Results in the order of `jobs`; None where one failed. The first of the list are begun first.

        Args:
            later: kind -> number of jobs expected after this phase, for the estimate of the time left.
        """
        unique = {job.folder(self.work): job for job in jobs}
        waiting = deque(job for job in unique.values() if job.result(self.work) is None and self._workers)
        total, done = len(waiting), 0
        if len(unique) > total:
            self.say(f"{phase}: {len(unique) - total} of {len(unique)} are there already")
        while waiting or any(worker.job for worker in self._workers):
            for worker in self._workers:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft())
            busy = [worker for worker in self._workers if worker.job]
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    done += 1
                    self._note(phase, worker, f"{done}/{total}", list(waiting), later or {})
        return [job.result(self.work) for job in jobs]

    def _note(self, phase: str, worker: Worker, place: str, waiting: list[Job], later: dict[str, int]) -> None:
        job = worker.job
        result, error, seconds = worker.answer()
        if error is None:
            self._seconds.setdefault(job.kind, []).append(seconds)
            measured = result.get("validation")
            outcome = f"{seconds:.0f} s" + (f", validation loss {choice_loss(measured):.3f}" if measured else "")
        else:
            self.errors[job.label] = error
            outcome = f"FAILED: {error}"
        open_jobs = waiting + [other.job for other in self._workers if other.job]
        left = self._left_s(open_jobs, later)
        self.say(
            f"{time.strftime('%H:%M:%S')} {phase} {place} {job.label}: {outcome}"
            + (f"; about {left / 60:.0f} min left" if left else "")
        )

    def _left_s(self, open_jobs: list[Job], later: dict[str, int]) -> float:
        counts = dict(later)
        for job in open_jobs:
            counts[job.kind] = counts.get(job.kind, 0) + 1
        known = {kind: statistics.fmean(seconds) for kind, seconds in self._seconds.items()}
        return sum(count * known.get(kind, 0.0) for kind, count in counts.items()) / len(self._workers)
