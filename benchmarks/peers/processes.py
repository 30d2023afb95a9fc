"""Starts peers, each in a process of its own, and asks them for one thing at a time while the others wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.peers.workload import Files, Task, as_dict
from homodistil.distributed.free_port import free_port


@dataclass(frozen=True)
class Variant:
    """One peer in one way of running it."""

    name: str
    module: str
    setting: str = ""
    options: dict = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    """Folders of packages that it needs beside ours."""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name


class PeerError(RuntimeError):
    """A peer ended; the message has the end of what it printed."""


class Running:
    """The process of a variant.

    Args:
        environment: beside what all peers get.
    """

    def __init__(self, variant: Variant, task: Task, files: Files, threads: int, environment: dict | None = None):
        self.variant = variant
        self._log = tempfile.TemporaryFile("w+")
        options, sizes = json.dumps(variant.options), json.dumps(as_dict(task))
        command = [sys.executable, "-m", "benchmarks.peers.child", variant.module, variant.setting, options, sizes]
        self._process = subprocess.Popen(
            [*command, str(files.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | _environment(variant, threads) | (environment or {}),
            cwd=ROOT,
            text=True,
        )

    def wait_until_ready(self) -> Running:
        self._answer()
        return self

    def ask(self, do: str, **values) -> dict:
        print(json.dumps({"do": do} | values), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise PeerError(f"{self.variant.label} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()


def _environment(variant: Variant, threads: int) -> dict[str, str]:
    paths = [str(ROOT), *variant.paths, os.environ.get("PYTHONPATH", "")]
    single_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return single_rank | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",  # all peers compute on the CPU, whatever the machine has
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
