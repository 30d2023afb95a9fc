"""Runs a worker script on real ranks of this machine under torchrun: what a fork cannot do, on a GPU.

On the CPU `ForkServer.run` (fork_server.py) does the same without the seconds that each rank needs to import; torchrun
itself is tested in slurm/test_launchers.py and faults/test_interrupt.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from homodistil.distributed.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]
TAIL_CHARS = 4000


def run_ranks(script: Path, args: list[str], num_ranks: int, timeout_s: int, env: dict[str, str] | None = None) -> str:
    """Standard output of `script` on `num_ranks` ranks. AssertionError with the end of the output on failure.

    After `timeout_s` seconds the worker is ended with all its ranks, which counts as a failure.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(script), *args]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        command, env=environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
        ended = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun ends its ranks on SIGTERM only
        output, errors = process.communicate()
        ended = f"not done after {timeout_s} s"
    assert ended == "exit code 0", f"{script.name} {args}: {ended}\n{_tail(output)}\n{_tail(errors)}"
    return output


def _tail(text: str) -> str:
    """The end of what the ranks themselves wrote: torchrun's own report of a failure says nothing about its cause."""
    traceback = [line for line in text.splitlines() if line.startswith("[rank0]:")]
    return "\n".join(traceback or [text])[-TAIL_CHARS:]
