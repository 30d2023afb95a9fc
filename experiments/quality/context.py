"""Teacher and corpus of a study, loaded once by each worker, and what jobs do with them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from filelock import FileLock

from experiments.quality.measured_run import MeasuredRun, RememberedLogits, halves
from experiments.quality.specs import content_hash
from homodistil.config.schema import RunConfig
from homodistil.distill.build_teacher import build_teacher
from homodistil.engine.build import load_engine_config, resolve_engine_config
from homodistil.engine.ds_config import teacher_dtype
from homodistil.models import family_of
from homodistil.training.heldout_scores import HeldoutScores
from homodistil.training.inputs import RunInputs, prepare_inputs, teacher_copy
from homodistil.training.teacher_checks import check_teacher
from homodistil.training.teacher_correction import corrected


class Context:
    """What jobs need of the worker that they run in."""

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
