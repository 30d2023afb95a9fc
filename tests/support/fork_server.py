"""Real jobs of several ranks in about two seconds each: imports happen once, ranks are forks of the process that did.

    with ForkServer() as server:
        job = server.start(ROOT / "launcher" / "train.py", ["--deepspeed", ..., "run.dir=..."], num_ranks=2)
        assert job.wait(timeout_s=60) == [0, 0], job.output()

        job = server.start("fork_jobs:train", [{"stage": 2}], num_ranks=3, env={"HOMODISTIL_FAULT": "train.step:hit=4"})
        time.sleep(0.5)
        job.kill(1)                       # SIGKILL to rank 1; kill() to all of them, kill(0, signal.SIGTERM)
        job.wait(timeout_s=60)            # one exit code a rank; -9: ended by signal 9
        print(job.output(1))              # what rank 1 wrote (stdout and stderr in one); output(): all ranks

        output = server.run(worker, ["[1, 2]"], num_ranks=2, timeout_s=60)  # to its end, which must be a good one

A target is a script (run as `__main__`, its arguments are strings) or "module:function" (called with the arguments,
which travel as JSON; the module is found on PYTHONPATH, tests/ or tests/faults/). Ranks have what
a launcher would give them: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT (a free one), and
a session of their own. Nothing is shared with the server afterwards but the memory of its imports. No launcher watches
them: a rank that dies leaves the others to themselves, until `wait` times out and ends them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLLOW_S, TAIL_CHARS = 5.0, 4000
SEARCHED = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"]
IMPORTED = """
deepspeed deepspeed.comm.torch deepspeed.module_inject.auto_ep_layer deepspeed.ops.op_builder.all_ops
deepspeed.runtime.zero.muon.muon_optimizer deepspeed.utils.pin_memory
transformers transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert
datasets torch.utils.tensorboard torch.utils.cpp_extension matplotlib.backends.backend_svg matplotlib.pyplot
docstring_parser
homodistil.cli homodistil.train homodistil.config.command_line homodistil.data.prepare.packing
homodistil.distributed.start_ranks homodistil.distributed.stop_agreement
""".split()
"""What ranks would import one by one: most of the time of a small job."""


class ForkServer:
    """The client's side. A context manager; leaving it ends the server and every rank that is still there."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self._socket, theirs = socket.socketpair()
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
        self._answers = self._socket.makefile("r", encoding="utf-8")
        self._num_jobs, self._pids = 0, set()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_exception: object) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._socket.shutdown(socket.SHUT_RDWR)  # not close: the file made from it keeps it open
        self._process.wait(timeout=30)
        self._answers.close()
        self._socket.close()
        self._folder.cleanup()

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
        pids = self.ask({"start": request})
        self._pids |= set(pids)
        return Job(self, pids, folder)

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
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(self._answers.readline())

    def forget(self, pids: list[int]) -> None:
        """Their numbers may be given to other processes from now on."""
        self._pids -= set(pids)


class Job:
    """Ranks of one job."""

    def __init__(self, server: ForkServer, pids: list[int], folder: Path) -> None:
        self._server, self.pids, self.folder = server, pids, folder
        self._codes: list[int | None] = [None] * len(pids)

    def codes(self) -> list[int | None]:
        """Exit code of each rank (-N: ended by signal N), None while it runs."""
        if None in self._codes:
            self._codes = self._server.ask({"codes": self.pids})
            self._server.forget([pid for pid, code in zip(self.pids, self._codes, strict=True) if code is not None])
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


class _Server:
    """The other side: one thread, so that a fork finds no lock held."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._codes: dict[int, int | None] = {}

    def serve(self) -> None:
        for line in self._connection.makefile("r", encoding="utf-8"):
            request = json.loads(line)
            answer = self._start(**request["start"]) if "start" in request else self._poll(request["codes"])
            self._connection.sendall(json.dumps(answer).encode() + b"\n")

    def _start(self, target: str, arguments: list, ranks: int, folder: str, env: dict, rank_env: dict, cwd: str):
        port = _free_port()
        pids = []
        for rank in range(ranks):
            output = Path(folder, f"rank-{rank}.txt")
            output.touch()
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env, **rank_env.get(str(rank), {})}
            pid = os.fork()
            if not pid:
                self._connection.close()
                _run_rank(target, arguments, {name: str(value) for name, value in own.items()}, output, cwd)
            pids.append(pid)
        self._codes |= dict.fromkeys(pids)
        return pids

    def _poll(self, pids: list[int]) -> list[int | None]:
        for pid in pids:
            if self._codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return [self._codes[pid] for pid in pids]


def _run_rank(target: str, arguments: list, env: dict[str, str], output: Path, cwd: str) -> None:
    """In the fork: become a rank, run the target, end without unwinding into the server's code."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ |= env
        os.chdir(cwd)
        _call(target, arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _call(target: str, arguments: list) -> None:
    if target.endswith(".py"):
        sys.argv = [target, *arguments]
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    else:
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _do_once() -> None:
    """What every rank would otherwise do anew, beside imports: read all fields' docstrings, transformers' renamings."""
    from transformers import BertConfig, BertForMaskedLM

    from homodistil.config.command_line import parse_job

    parse_job([])
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
        BertForMaskedLM.from_pretrained(folder)


def main() -> None:
    sys.path[:0] = [str(path) for path in SEARCHED]
    for name in IMPORTED:
        importlib.import_module(name)
    _do_once()
    gc.collect()
    gc.freeze()  # a rank's collector need not look through (and copy the pages of) what the imports have made
    # A test that is interrupted closes the socket: nothing else ends the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
