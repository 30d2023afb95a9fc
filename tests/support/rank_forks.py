"""The process that fork_server.py starts: it imports what a job needs, and forks ranks for its clients."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"]
IMPORTED = """
deepspeed deepspeed.comm.torch deepspeed.module_inject.auto_ep_layer deepspeed.ops.op_builder.all_ops
deepspeed.utils.pin_memory
transformers transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert
datasets torch.utils.tensorboard torch.utils.cpp_extension matplotlib.backends.backend_svg matplotlib.pyplot
docstring_parser
homodistil.cli homodistil.train homodistil.config.command_line homodistil.data.prepare.packing
homodistil.distributed.start_ranks homodistil.distributed.stop_agreement
homodistil.evaluation.glue.grid homodistil.evaluation.squad.grid homodistil.report.command
""".split()
"""What ranks would import one by one: most of the time of a small job."""
FIRST_CLIENT_S = 60
"""Who starts this process connects to it, unless it has been killed in between."""


class RankForks:
    """One thread, so that a fork finds no lock held. It ends with its last client."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._codes = listener, {}
        self._pids: dict[socket.socket, list[int]] = defaultdict(list)
        """Connection of a client -> its ranks."""
        self._selector = selectors.PollSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> None:
        while len(self._selector.get_map()) > 1 or not self._pids:
            if not (ready := self._selector.select(FIRST_CLIENT_S if not self._pids else None)):
                return
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._welcome(self._listener.accept()[0])
                else:
                    self._answer(key.fileobj, key.data)

    def _welcome(self, client: socket.socket) -> None:
        self._pids[client] = []
        self._selector.register(client, selectors.EVENT_READ, client.makefile("r", encoding="utf-8"))

    def _answer(self, client: socket.socket, lines) -> None:
        """A client waits for the answer before it asks again, so nothing is left in the buffer of `lines`."""
        with contextlib.suppress(ConnectionError):
            if line := lines.readline():
                request = json.loads(line)
                is_start = "start" in request
                answer = self._start(client, **request["start"]) if is_start else self._poll(request["codes"])
                client.sendall(json.dumps(answer).encode() + b"\n")
                return
        self._selector.unregister(client)
        for pid, code in zip(self._pids[client], self._poll(self._pids[client]), strict=True):
            if code is None:
                with contextlib.suppress(ProcessLookupError):  # not yet the leader of its session
                    os.killpg(pid, signal.SIGKILL)
        lines.close()
        client.close()

    def _start(self, client: socket.socket, target, arguments, ranks, folder, env, rank_env, cwd) -> list[int]:
        from homodistil.distributed.free_port import free_port  # main() puts it on the path

        port, pids = free_port(), []
        for rank in range(ranks):
            output = Path(folder, f"rank-{rank}.txt")
            output.touch()
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env, **rank_env.get(str(rank), {})}
            pid = os.fork()
            if not pid:
                for key in list(self._selector.get_map().values()):
                    os.close(key.fd)
                _run_rank(target, arguments, {name: str(value) for name, value in own.items()}, output, cwd)
            pids.append(pid)
        self._codes |= dict.fromkeys(pids)
        self._pids[client] += pids
        return pids

    def _poll(self, pids: list[int]) -> list[int | None]:
        for pid in pids:
            if self._codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return [self._codes[pid] for pid in pids]


def _run_rank(target: str, arguments: list, env: dict[str, str], output: Path, cwd: str) -> NoReturn:
    """In the fork: become a rank, run the target, end without unwinding into the server's code."""
    code = 1
    try:
        os.setsid()
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # who runs the tests in the background may have it ignored
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
    if target.startswith("-m "):
        sys.argv = [target.removeprefix("-m "), *arguments]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif target.endswith(".py"):
        sys.argv = [target, *arguments]
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    else:
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(*arguments)


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
    gc.disable()  # nothing of it can be freed
    for name in IMPORTED:
        importlib.import_module(name)
    gc.enable()
    _do_once()
    gc.collect()
    gc.freeze()  # a rank's collector need not look through (and copy the pages of) what the imports have made
    RankForks(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
