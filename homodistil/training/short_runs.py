"""Runs of a few steps that leave nothing behind: to measure a machine (planning), to try one step (preflight)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from homodistil.config.derive import compressed_schedule, measurement_inputs, small_config
from homodistil.config.schema import RunConfig
from homodistil.data.prepare.corpus import Corpus
from homodistil.data.prepare.label_choice import label_rule
from homodistil.data.rows import TextLabels
from homodistil.distributed import ranks
from homodistil.engine.build import resolve_engine_config
from homodistil.engine.ds_config import teacher_dtype
from homodistil.metrics.recorder import Recorder
from homodistil.training.embedder import sentence_modules_of
from homodistil.training.inputs import RunInputs, prepare_inputs
from homodistil.training.run import DistillationRun
from homodistil.training.stored_outputs import computed_outputs
from homodistil.training.teacher_facts import TeacherFacts
from homodistil.training.train_state import TrainState
from homodistil.training.trainer import Trainer

_BATCH_ENTRIES = ("train_batch_size", "gradient_accumulation_steps")


@contextmanager
def measurement(config: RunConfig, raw_engine_config: dict, device: torch.device) -> Iterator[Trainer]:
    """The trainer of `config` with a compressed schedule. Every rank enters it.

    Nothing is written except to the cache of data and packaged teachers.

    Args:
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
    """
    short = compressed_schedule(config)
    engine_config = resolve_engine_config(raw_engine_config, short.train, ranks.world_size())
    run_inputs = prepare_inputs(measurement_inputs(short), device)
    with tempfile.TemporaryDirectory() as folder:
        with _unrecorded(DistillationRun(short, engine_config, run_inputs, Path(folder), command="")) as trainer:
            yield trainer


@contextmanager
def trial(
    config: RunConfig, raw_engine_config: dict, teacher: TeacherFacts, rows: np.ndarray, device: torch.device
) -> Iterator[Trainer]:
    """The trainer of `config` with one micro-batch per rank and step. Every rank enters it. Nothing is written.

    Args:
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
        rows: blocks of text, the same on every rank, (num_blocks, seq_len) int64.
    """
    small = small_config(config, ranks.world_size())
    raw = {name: value for name, value in raw_engine_config.items() if name not in _BATCH_ENTRIES}
    rule = label_rule(config.data, teacher.resolved.teacher_config)
    labels = np.zeros((len(rows), rule.width), dtype=np.float32) if rule else None
    corpus = Corpus(rows, rows, "preflight", "a sample", labels=rule and TextLabels(labels, labels))
    window = teacher.resolved.family.window(teacher.resolved.teacher_config)
    run_inputs = RunInputs(
        teacher.folder,
        teacher.tokenizer,
        corpus,
        device,
        config.teacher.allow_pickle,
        window=window,
        head=teacher.resolved.task.head,
        sentence_modules=sentence_modules_of(config.data, teacher.folder),
    )
    engine_config = resolve_engine_config(raw, small.train, ranks.world_size())
    if config.teacher.is_stored:
        dtype = teacher_dtype(config.teacher.dtype, engine_config, device)
        run_inputs = dataclasses.replace(run_inputs, outputs=computed_outputs(small, dtype, run_inputs))
    run = DistillationRun(small, engine_config, run_inputs, Path(config.run_dir), command="")
    with _unrecorded(run) as trainer:
        yield trainer
    trainer.engine.destroy()


@contextmanager
def _unrecorded(run: DistillationRun) -> Iterator[Trainer]:
    """A trainer at the start of `run` that keeps no metrics; no checkpoint or export is due."""
    with Recorder(run.folder, run.config.train.steps, 0, enabled=False) as recorder:
        run.shrinker.before_training(recorder)
        yield run.build_trainer(recorder, TrainState())
