"""A worker process: one rank of its own that does job after job."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from experiments.quality.context import Context
from experiments.quality.jobs import ERROR_FILE, Job
from homodistil.distributed import graceful_stop
from homodistil.engine.build import init_ranks
from homodistil.errors import StopRequested

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def work_off(connection: Connection, work: Path, engine_json: Path, log: Path) -> None:
    """Target of the process: receives jobs, answers each with (result or None, error or None, wall seconds).

    It ends when the other side closes, and after a failure: what a failed run leaves in memory is nobody's business.
    """
    _write_output_to(log)
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, StopRequested), graceful_stop.on_signals():
        context = Context(work, engine_json, init_ranks())
        while True:
            job: Job = connection.recv()
            answer = _do(job, context)
            connection.send(answer)
            if answer[1] is not None:
                break
    os._exit(0)  # a process group of one has nobody to say goodbye to


def _do(job: Job, context: Context) -> tuple[dict | None, str | None, float]:
    start = time.monotonic()
    print(f"\n=== {job.label} -> {job.folder(context.work)}", flush=True)
    try:
        result, error = job.run(context), None
    except StopRequested:
        raise
    except Exception as failure:
        traceback.print_exc()
        result, error = None, f"{type(failure).__name__}: {failure}".splitlines()[0]
        note = {"label": job.label, "error": error}
        (job.folder(context.work) / ERROR_FILE).write_text(json.dumps(note) + "\n", encoding="utf-8")
    gc.collect()
    return result, error, time.monotonic() - start


def _write_output_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
