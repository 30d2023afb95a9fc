"""Starts peers, each in a process of its own, and asks them for one thing at a time while the others wait."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.launch import ROOT
from benchmarks.peers.workload import Files, Task, as_dict


@dataclass(frozen=True)
class Variant:
    """One peer in one way of running it."""

    name: str
    module: str
    setting: str = ""
    options: dict = field(default_factory=dict)
    num_ranks: int = 1
    paths: tuple[str, ...] = ()
    """Folders of packages that it needs beside ours."""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name


class PeerError(RuntimeError):
    """A peer ended; the message has the end of what it printed."""


class Running:
    """The process (or ranks) of a variant.

    Args:
        threads: over all its ranks.
        environment: beside the own one.
    """

    def __init__(self, variant: Variant, task: Task, files: Files, threads: int, environment: dict | None = None):
        self.variant = variant
        self._log = tempfile.TemporaryFile("w+")
        options, sizes = json.dumps(variant.options), json.dumps(as_dict(task))
        command = [sys.executable, "-m", "benchmarks.peers.child", variant.module, variant.setting, options, sizes]
        shared = _environment(variant, threads) | (environment or {})
        self._ranks = [
            subprocess.Popen(
                [*command, str(files.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                text=True,
            )
            for rank in range(variant.num_ranks)
        ]

    def wait_until_ready(self) -> Running:
        for rank in self._ranks:
            self._answer(rank)
        return self

    def ask(self, do: str, **values) -> list[dict]:
        """The answers of all ranks, the first rank's first."""
        for rank in self._ranks:
            print(json.dumps({"do": do} | values), file=rank.stdin, flush=True)
        return [self._answer(rank) for rank in self._ranks]

    def _answer(self, rank: subprocess.Popen) -> dict:
        line = rank.stdout.readline()
        if not line:
            self._log.seek(0)
            raise PeerError(f"{self.variant.label} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
            rank.stdin.close()
            rank.stdout.close()
        self._log.close()


def _environment(variant: Variant, threads: int) -> dict[str, str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    paths = [str(ROOT), *variant.paths, os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads // variant.num_ranks),
        "WORLD_SIZE": str(variant.num_ranks),
        "LOCAL_WORLD_SIZE": str(variant.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def textbrewer_paths(folder: Path) -> tuple[str, ...]:
    """Where TextBrewer is, installed into `folder` on first use: beside our packages, not among them.

    Raises:
        PeerError: it cannot be installed.
    """
    if not (folder / "textbrewer").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1"]
        done = subprocess.run(
            [*command, "--target", str(folder), "textbrewer==0.2.1.post1"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PeerError(f"textbrewer cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return (str(folder),)
