"""Tries one real training step on every rank with student, teacher and engine of the run, and then the first cut."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from homodistil.config.derive import small_config
from homodistil.config.schema import RunConfig
from homodistil.data.prepare.corpus import Corpus
from homodistil.distill.teacher import load_config
from homodistil.distributed import ranks
from homodistil.engine.build import resolve_engine_config
from homodistil.metrics.recorder import Recorder, memory_bytes
from homodistil.preflight.findings import Findings
from homodistil.training.inputs import RunInputs, window_of
from homodistil.training.run import DistillationRun
from homodistil.training.trainer import Trainer, TrainState

_BATCH_ENTRIES = ("train_batch_size", "gradient_accumulation_steps")


def try_step(
    findings: Findings,
    config: RunConfig,
    raw_engine_config: dict,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: np.ndarray,
    device: torch.device,
) -> None:
    """Train one step with one micro-batch per rank, make the first cut, and note time and memory in `findings`.

    Every rank calls it. Nothing is written: the recorder is disabled, and no checkpoint or export is due.

    Args:
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
        teacher: folder of the teacher on this machine.
        rows: blocks of text, the same on every rank, (num_blocks, seq_len) int64.
    """
    start_s = time.perf_counter()
    small = small_config(config, ranks.world_size())
    raw = {name: value for name, value in raw_engine_config.items() if name not in _BATCH_ENTRIES}
    corpus = Corpus(rows, rows, "preflight", "a sample")
    window = window_of(load_config(teacher))
    run_inputs = RunInputs(teacher, tokenizer, corpus, device, config.teacher.allow_pickle, window=window)
    engine_config = resolve_engine_config(raw, small.train, ranks.world_size())
    run = DistillationRun(small, engine_config, run_inputs, Path(config.run_dir), command="")
    with Recorder(run.folder, small.train.steps, 0, enabled=False) as recorder:
        run.shrinker.before_training(recorder)
        trainer = run.build_trainer(recorder, TrainState())
        trainer.train_step()
        cut = _first_cut(trainer)
    trainer.engine.destroy()
    peak = max(value for name, value in memory_bytes().items())
    seconds = time.perf_counter() - start_s
    findings.note("step", f"forward, backward, step{cut}; {peak / 1e9:.2f} GB in use, {seconds:.1f} s")


def _first_cut(trainer: Trainer) -> str:
    """Apply the first event of the schedule now. Returns its text for the row; "" if the schedule has no event."""
    student, table = trainer.student, trainer.shrinker.pruner.schedule.table
    widths = {axis: width for axis, width in table.get(min(table, default=0), {}).items()}
    due = {axis: width for axis, width in widths.items() if width < student.widths[axis]}
    if not due:
        return ""
    at_event = dataclasses.replace(trainer.state, step=min(table))
    trainer.resize(trainer.shrinker.due(trainer.live, trainer.prefetcher, at_event))
    return f", cut to hidden {student.widths['hidden']}"
