"""The queue of jobs: nothing is done twice, and a failure ends nothing."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from experiments.quality.jobs import Job
from experiments.quality.pool import Pool


class _ThreadProcess:
    """A worker in a thread: does jobs that are named, fails at "bad", dies at "deadly"."""

    def __init__(self, connection: Connection, work: Path, done: list[str]) -> None:
        self._connection = Connection(os.dup(connection.fileno()))
        self._work, self._done = work, done
        self.exitcode = None
        self._thread = threading.Thread(target=self._work_off, daemon=True)
        self._thread.start()

    def _work_off(self) -> None:
        try:
            while True:
                job = self._connection.recv()
                self._done.append(job.name)
                if job.name == "deadly":
                    self.exitcode = -9
                    break
                if job.name == "bad":
                    self._connection.send((None, "ValueError: bad", 1.0))
                    break
                job.run(self)
                self._connection.send(({}, None, 60.0))
        except (EOFError, OSError):
            pass
        self._connection.close()

    @property
    def work(self) -> Path:
        return self._work

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def kill(self) -> None:
        pass


def _named_job(name: str):
    return _NamedJob(name)


@dataclass(frozen=True)
class _NamedJob(Job):
    name: str
    kind = "named"

    @property
    def label(self) -> str:
        return self.name

    def folder(self, work: Path) -> Path:
        return work / self.name

    def execute(self, context, folder: Path) -> dict:
        assert not any(folder.iterdir())
        return {"name": self.name}


def test_jobs_are_done_in_order_once_and_a_failure_or_a_death_ends_nothing(tmp_path):

    done, lines, starts = [], [], []

    def start(connection: Connection, number: int) -> _ThreadProcess:
        starts.append(number)
        return _ThreadProcess(connection, tmp_path, done)

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "left over").touch()  # of an attempt that was interrupted
    names = ["a", "bad", "b", "deadly", "c", "a"]
    with Pool(tmp_path, start, 1, lines.append) as pool:
        found = pool.run("phase", [_named_job(name) for name in names], later={"named": 2})
    assert [result and result["name"] for result in found] == ["a", None, "b", None, "c", "a"]
    assert done == ["a", "bad", "b", "deadly", "c"]
    assert starts == [0, 0, 0]
    assert pool.errors == {"bad": "ValueError: bad", "deadly": "the worker died with exit code -9"}
    # After the first of five, 60 s each: four and the two of later phases are left.
    assert lines[0].endswith("phase 1/5 a: 60 s; about 6 min left")

    done.clear()
    with Pool(tmp_path, start, 1, lines.append) as pool:  # the same command again
        found = pool.run("phase", [_named_job(name) for name in ("a", "c", "new", "bad")])
    assert done == ["new", "bad"]
    assert "phase: 2 of 4 are there already" in lines
    assert [result and result["name"] for result in found] == ["a", "c", "new", None]

    done.clear()
    with Pool(tmp_path, start, 0, lines.append) as pool:  # only what is there
        found = pool.run("phase", [_named_job(name) for name in ("a", "newer", "bad")])
    assert not done and not pool.errors and [result and result["name"] for result in found] == ["a", None, None]
