"""Real jobs of several ranks in about two seconds each: imports happen once, ranks are forks of the process that did.

The other side is rank_forks.py. Lanes of one test run share it: whoever needs it first starts it.

    with ForkServer() as server:
        job = server.start(ROOT / "launcher" / "train.py", ["--deepspeed", ..., "run.dir=..."], num_ranks=2)
        assert job.wait(timeout_s=60) == [0, 0], job.output()

        job = server.start("fork_jobs:train", [{"stage": 2}], num_ranks=3, env={"HOMODISTIL_FAULT": "train.step:hit=4"})
        time.sleep(0.5)
        job.kill(1)                       # SIGKILL to rank 1; kill() to all of them, kill(0, signal.SIGTERM)
        job.wait(timeout_s=60)            # one exit code a rank; -9: ended by signal 9
        print(job.output(1))              # what rank 1 wrote (stdout and stderr in one); output(): all ranks

        output = server.run(worker, ["[1, 2]"], num_ranks=2, timeout_s=60)  # to its end, which must be a good one

A target is a script or "-m module" (run as `__main__`, its arguments are strings) or "module:function" (called with the
arguments, which travel as JSON; the module is found on PYTHONPATH, tests/ or tests/faults/). Ranks have what a launcher
would give them: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT (a free one), and
a session of their own. Nothing is shared with the server afterwards but the memory of its imports. No launcher watches
them: a rank that dies leaves the others to themselves, until `wait` times out and ends them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLLOW_S, TAIL_CHARS = 5.0, 4000
SERVER = Path(__file__).with_name("rank_forks.py")


class ForkServer:
    """The client's side. A context manager; leaving it ends every rank that is still there.

    Args:
        name: clients with the same name share a server, which ends with the last of them. None: one of its own.
    """

    def __init__(self, name: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self._address = f"\0homodistil-fork-server-{name or uuid.uuid4().hex}"  # abstract: no file is left behind
        self._num_jobs = 0
        self._connect()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_exception: object) -> None:
        """The server answers the end of the connection by ending its ranks, and closes it then."""
        with contextlib.suppress(ConnectionError):
            self._socket.shutdown(socket.SHUT_WR)
            self._answers.read()
        self._answers.close()
        self._socket.close()
        self._folder.cleanup()

    def _connect(self) -> None:
        """To the server, which is started if there is none yet."""
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(self._address)
                break
            except ConnectionRefusedError:
                self._socket.close()
                if not self._start_server():
                    time.sleep(0.05)  # another client has just begun to start it
        self._answers = self._socket.makefile("r", encoding="utf-8")

    def _start_server(self) -> bool:
        """False if somebody else does."""
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(self._address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return False
            listener.listen()
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment |= {"TOKENIZERS_PARALLELISM": "false"}
            command, fd = [sys.executable, "-P", str(SERVER), str(listener.fileno())], listener.fileno()
            subprocess.Popen(command, env=environment, pass_fds=[fd], cwd=ROOT, start_new_session=True)
        return True

    def start(
        self,
        target: Path | str,
        arguments: list | None = None,
        num_ranks: int = 2,
        env: dict[str, str] | None = None,
        rank_env: dict[int, dict[str, str]] | None = None,
        cwd: Path | None = None,
    ) -> Job:
        """Fork the ranks of a job and return at once. `env` is for all ranks, `rank_env` for single ones."""
        self._num_jobs += 1
        folder = Path(self._folder.name) / f"job-{self._num_jobs}"
        folder.mkdir()
        request = {"target": str(target), "arguments": arguments or [], "ranks": num_ranks, "folder": str(folder)}
        request |= {"env": env or {}, "rank_env": rank_env or {}, "cwd": str(cwd or folder)}
        return Job(self, self.ask({"start": request}), folder)

    def start_program(self, source: str, arguments: list, num_ranks: int = 1, env: dict[str, str] | None = None) -> Job:
        """`start` of a program that is given as text."""
        path = Path(self._folder.name) / f"program-{self._num_jobs}.py"
        path.write_text(source, encoding="utf-8")
        return self.start(path, arguments, num_ranks, env)

    def run(self, script: Path, arguments: list[str], num_ranks: int, timeout_s: float) -> str:
        """What all ranks of `script` wrote, once they have ended well. AssertionError with the end of it otherwise.

        A rank that fails, or `timeout_s` seconds, end the others as well, as a launcher would.
        """
        job = self.start(script, arguments, num_ranks)
        codes = job.wait_as_launcher(timeout_s)
        ended = f"exit codes {codes}, {timeout_s} s allowed"
        assert codes == [0] * num_ranks, f"{script.name} {arguments}: {ended}\n{job.blamed(codes)}"
        return job.output()

    def ask(self, request: dict) -> list:
        try:
            answer = self._answer(request)
        except ConnectionError:
            if "start" not in request or self._num_jobs > 1:
                raise
            self._connect()  # its last client left, and it ended, while this one came
            answer = self._answer(request)
        return json.loads(answer)

    def _answer(self, request: dict) -> str:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        if not (answer := self._answers.readline()):
            raise ConnectionResetError("the fork server has ended; what it said is above")
        return answer


class Job:
    """Ranks of one job."""

    def __init__(self, server: ForkServer, pids: list[int], folder: Path) -> None:
        self._server, self.pids, self.folder = server, pids, folder
        self._codes: list[int | None] = [None] * len(pids)

    def codes(self) -> list[int | None]:
        """Exit code of each rank (-N: ended by signal N), None while it runs."""
        if None in self._codes:
            self._codes = self._server.ask({"codes": self.pids})
        return self._codes

    def is_running(self) -> bool:
        return None in self.codes()

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes once every rank has ended. AssertionError, and SIGKILL to all, if that takes longer."""
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > deadline:
                found = self.codes()
                self.kill()
                raise AssertionError(f"not done after {timeout_s} s, exit codes {found}\n{self.output()}")
            time.sleep(0.02)
        return self.codes()

    def wait_as_launcher(self, timeout_s: float) -> list[int]:
        """Exit codes once every rank has ended. A rank that fails, or `timeout_s` seconds, end the others as well."""
        deadline = time.monotonic() + timeout_s
        while self.is_running() and set(self.codes()) <= {None, 0} and time.monotonic() < deadline:
            time.sleep(0.02)
        is_failed = not set(self.codes()) <= {None, 0}
        deadline = time.monotonic() + FOLLOW_S * is_failed
        while self.is_running():
            if time.monotonic() >= deadline:
                self.kill()
            time.sleep(0.02)
        return self.codes()

    def blamed(self, codes: list[int]) -> str:
        """The end of what the ranks wrote that failed by themselves."""
        failed = [rank for rank, code in enumerate(codes) if code not in (0, -signal.SIGKILL)]
        return "\n".join(self.output(rank)[-TAIL_CHARS:] for rank in failed or range(len(codes)))

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all; those that have ended are left out. Returns without waiting."""
        for i, code in enumerate(self.codes()):
            if code is None and rank in (None, i):
                os.kill(self.pids[i], number)

    def output(self, rank: int | None = None) -> str:
        """What a rank (or all, one after the other) has written so far."""
        chosen = range(len(self.pids)) if rank is None else [rank]
        return "\n".join((self.folder / f"rank-{i}.txt").read_text(errors="replace") for i in chosen)
