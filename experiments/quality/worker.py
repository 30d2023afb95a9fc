"""A worker process: one rank of its own that does job after job, with teacher and corpus loaded once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from filelock import FileLock

from experiments.quality.jobs import ERROR_FILE, Job
from experiments.quality.measured_run import MeasuredRun, RememberedLogits, halves
from experiments.quality.specs import content_hash
from homodistil.config.schema import RunConfig
from homodistil.distill.build_teacher import build_teacher
from homodistil.distributed import graceful_stop
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.engine.ds_config import teacher_dtype
from homodistil.errors import StopRequested
from homodistil.models import family_of
from homodistil.training.heldout_scores import HeldoutScores
from homodistil.training.inputs import RunInputs, prepare_inputs, teacher_copy
from homodistil.training.teacher_checks import check_teacher
from homodistil.training.teacher_correction import corrected

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Context:
    """What jobs need of the worker they run in."""

    def __init__(self, work: Path, engine_json: Path, device: torch.device) -> None:
        self.work, self.device = work, device
        self._engine_config = load_engine_config(engine_json)
        self._materials: dict[str, RunInputs] = {}
        self._remembered: tuple[str, tuple[RememberedLogits, RememberedLogits]] | None = None

    def train(self, config: RunConfig, folder: Path, eval_blocks: int | None) -> dict:
        """One run of the product, measured."""
        engine_config = resolve_engine_config(copy.deepcopy(self._engine_config), config.train, 1)
        teacher_dtype(config.teacher.dtype, engine_config, self.device)
        check_teacher(config)
        both = halves(self.run_inputs(config), eval_blocks)
        torch.manual_seed(config.train.seed)  # whatever a worker did before must not show
        run = MeasuredRun(config, engine_config, both, self._teacher_logits(config, eval_blocks), folder)
        run.run()
        return run.measured()

    def _teacher_logits(self, config: RunConfig, eval_blocks: int | None) -> tuple[RememberedLogits, RememberedLogits]:
        """Of both halves, from the run before if that had the same teacher and batches."""
        folder = self.run_inputs(config).teacher
        sections = [dataclasses.asdict(part) for part in (config.teacher, config.data)]
        key = content_hash([folder, *sections, config.train.eval_batch_size, eval_blocks])
        if self._remembered is None or self._remembered[0] != key:
            self._remembered = key, (RememberedLogits(), RememberedLogits())
        return self._remembered[1]

    def run_inputs(self, config: RunConfig) -> RunInputs:
        """Corpus and corrected teacher, the same for all runs with these teacher, data and batch settings."""
        sections = [dataclasses.asdict(part) for part in (config.teacher, config.data)]
        key = content_hash([*sections, config.train.global_batch_size])
        if key not in self._materials:
            engine_config = resolve_engine_config(copy.deepcopy(self._engine_config), config.train, 1)
            folder = self.work / "corrections" / key
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):  # the other worker waits, and finds it done
                run_inputs, _ = corrected(config, engine_config, prepare_inputs(config, self.device), folder)
            self._materials[key] = run_inputs
        return self._materials[key]

    def settled_inputs(self, config: RunConfig) -> RunInputs:
        """`run_inputs`; what `config` leaves to the teacher is settled in it, also where the inputs were there."""
        check_teacher(config)
        return self.run_inputs(config)

    def evaluate_teacher(self, config: RunConfig, eval_blocks: int | None) -> dict:
        engine_config = resolve_engine_config(copy.deepcopy(self._engine_config), config.train, 1)
        run_inputs = self.settled_inputs(config)
        dtype = teacher_dtype(config.teacher.dtype, engine_config, self.device)
        teacher = build_teacher(teacher_copy(run_inputs, dtype), config.teacher, self.device, dtype)
        family = family_of(teacher.model.config.model_type)
        scores = [HeldoutScores(config, half, family).of_teacher(teacher) for half in halves(run_inputs, eval_blocks)]
        return {
            "validation": scores[0],
            "test": scores[1],
            "parameters": sum(p.numel() for p in teacher.model.parameters()),
            "hidden_size": teacher.model.config.hidden_size,
            "folder": run_inputs.teacher,
        }


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
