"""Starts the ranks of a benchmark on this machine and brings back what rank 0 measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT
from homodistil.distributed.free_port import free_port

RESULT_FILE = "HOMODISTIL_BENCHMARK_RESULT"


def run_ranks(module: str, args: list[str], num_ranks: int, environment: dict[str, str]) -> dict:
    """Runs `python -m module` under torchrun in fresh processes; each has LOCAL_RANK set and calls `hand_back` last."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", module, *args]
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        fixed = {"PYTHONPATH": paths, RESULT_FILE: str(result)}
        subprocess.run(command, env=os.environ | defaults | fixed | environment, check=True)
        return json.loads(result.read_text())


def is_rank() -> bool:
    return "LOCAL_RANK" in os.environ


def join_ranks() -> torch.device:
    """In a rank: the process group, and the device of this rank."""
    from homodistil.engine.build import init_ranks

    torch.set_num_threads(1)
    return init_ranks()


def hand_back(result: dict) -> None:
    """In a rank, last: rank 0's `result` becomes what `run_ranks` returns."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(os.environ[RESULT_FILE]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
