"""The process of one peer: builds it, then does what the coordinator asks for, one line of JSON each way.

python -m benchmarks.peers.child MODULE SETTING OPTIONS TASK FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness.memory_counters import memory_in_use, peak_memory, start_peak
from benchmarks.peers.workload import Files, Task

CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""processor: time that all threads of the process computed (waiting for each other included)."""


class Served:
    """The commands."""

    def __init__(self, module: str, setting: str, options: str, task: str, folder: str) -> None:
        peer = importlib.import_module(f"benchmarks.peers.{module}").Peer
        self.before = memory_in_use(CPU)  # libraries
        self.peer = peer(Task(**json.loads(task)), Files(Path(folder)), setting, json.loads(options))

    def step(self, clock: str) -> dict:
        now = CLOCKS[clock]
        start = now()
        self.peer.step()
        return {"ms": (now() - start) * 1e3}

    def terms(self) -> dict:
        return {name: float(value) for name, value in self.peer.terms.items()}

    def start_peak(self) -> dict:
        start_peak(CPU)
        return {}

    def peak(self) -> dict:
        return {"peak": peak_memory(CPU), "libraries": self.before}

    def narrow(self, step: int) -> dict:
        return self.peer.narrow(step)

    def schedule(self) -> dict:
        return {"events": self.peer.schedule()}


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = Served(*sys.argv[1:])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        result = getattr(served, asked.pop("do"))(**asked)
        print(json.dumps(result), file=answers, flush=True)
    os._exit(0)  # threads and process groups of libraries are not waited for


if __name__ == "__main__":
    main()
