"""Teacher correction: some MLM steps on the corpus before distilling, as Minitron does; cached by content.

The same loop as distillation, with no teacher and no pruning. An encoder without an MLM head gets one here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from homodistil.config.derive import correction_config, correction_key
from homodistil.config.schema import RunConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import load_config
from homodistil.distributed import groups, ranks
from homodistil.engine.build import build_engine
from homodistil.engine.ds_config import student_dtype
from homodistil.engine.engine import TrainingEngine
from homodistil.export.stock_model import save_checkpoint, stock_model
from homodistil.files import write_atomically
from homodistil.metrics.progress import doing
from homodistil.metrics.recorder import METRICS_FILE, Recorder, read_lines
from homodistil.metrics.term_labels import language_modelling
from homodistil.resize import master_weights
from homodistil.training.corrected_teacher import (
    FACTS_FILE,
    remove_damaged,
    remove_other,
    weights_digest,
    write_corrected_checksums,
)
from homodistil.training.fingerprints import CORRECTED, check_same
from homodistil.training.heldout_scores import HeldoutScores, language_loss
from homodistil.training.inputs import PERIODIC_EVALUATION_SEQUENCES, RunInputs, teacher_copy
from homodistil.training.step_logger import StepLogger, run_recorder, speeds
from homodistil.training.teacher_checks import cache_dir
from homodistil.training.trainer import Trainer

TEACHER_FILE = "teacher.json"


def corrected(
    config: RunConfig, engine_config: dict, run_inputs: RunInputs, run_folder: Path
) -> tuple[RunInputs, dict]:
    """RunInputs with the corrected teacher, and what is known of the correction ({} without one).

    The facts: before and after (held-out results), tokens_per_s_first and _last, steps. The run folder remembers which
    teacher its run began with: resuming in another precision must not change it.
    """
    if not config.teacher.correction_steps:
        return run_inputs, {}
    leaders = groups.cache_leaders(cache_dir(config))
    final = _place(run_folder, cache_dir(config) / "teachers", _key(config, engine_config, run_inputs), leaders)
    if not ranks.on_rank_zero(final.is_dir):
        work = Path(ranks.on_rank_zero(lambda: str(final.with_name(f".{final.name}.{os.getpid()}"))))
        try:
            _Correction(config, engine_config, run_inputs, work).run()
            _check_begun_with(run_folder, run_inputs, work)  # another one must not stay where the old one is to be made
        except BaseException:  # a request to stop too: without a checkpoint nothing in there is of use
            if ranks.rank() == 0:
                shutil.rmtree(work, ignore_errors=True)
            raise
        ranks.on_rank_zero(lambda: _publish(work, final))
    fingerprints = _check_begun_with(run_folder, run_inputs, final)
    groups.once(leaders, lambda: remove_other(final, fingerprints[CORRECTED]))
    groups.hand_over(leaders, final)
    ranks.on_rank_zero(
        lambda: write_atomically(run_folder / TEACHER_FILE, json.dumps({"corrected": final.name}) + "\n")
    )
    facts = json.loads((final / FACTS_FILE).read_text(encoding="utf-8"))
    if ranks.rank() == 0:
        before, after = language_loss(facts["before"]), language_loss(facts["after"])
        what = f"held-out {language_modelling(config.data.task)} loss"
        print(f"teacher corrected on the corpus: {what} {before:.3f} -> {after:.3f}", flush=True)
    fingerprints = {**run_inputs.fingerprints, **fingerprints}
    return dataclasses.replace(run_inputs, teacher=str(final), fingerprints=fingerprints), facts


def _check_begun_with(run_folder: Path, run_inputs: RunInputs, folder: Path) -> dict[str, str]:
    """Fingerprint of the corrected teacher in rank 0's `folder`. Raises `UserError` if the run began with another."""
    fingerprints = {CORRECTED: ranks.on_rank_zero(lambda: weights_digest(folder))}
    check_same(run_folder, run_inputs.begun_with, fingerprints)
    return fingerprints


def _place(run_folder: Path, teachers: Path, key: str, leaders: groups.Leaders) -> Path:
    """Folder of the corrected teacher; if rank 0 has none there, it is to be made. Damaged ones are removed."""
    for name in (ranks.on_rank_zero(lambda: _begun_with(run_folder, teachers)), key):
        if name is not None:
            folder = teachers / name
            groups.once(leaders, lambda folder=folder: remove_damaged(folder))
            if ranks.on_rank_zero(folder.is_dir):
                return folder
    return teachers / key


def _begun_with(run_folder: Path, teachers: Path) -> str | None:
    """Name of the corrected teacher that this run folder's run began with, None when there is none (any more)."""
    try:
        name = json.loads((run_folder / TEACHER_FILE).read_text(encoding="utf-8"))["corrected"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and (teachers / name).is_dir() else None


class _Correction:
    def __init__(self, config: RunConfig, engine_config: dict, run_inputs: RunInputs, work: Path) -> None:
        self.config = correction_config(config)
        self.engine_config, self.run_inputs, self.work = engine_config, run_inputs, work
        model = teacher_copy(run_inputs, torch.float32, dropout=0.0).to(run_inputs.device)
        self.student = Student(model, self.config.loss, distil=False)

    def run(self) -> None:
        """Train, and leave a stock checkpoint with FACTS_FILE in `work`."""
        if ranks.rank() == 0:
            what = f"{self.config.train.steps} steps of {language_modelling(self.config.data.task)}"
            print(f"correcting the teacher: {what} on the corpus", flush=True)
        before = self._evaluate()
        with doing("building DeepSpeed's engine, and trying a resize of it"):
            config = self.config
            engine = build_engine(self.student, config.train, config.optimizer, self.engine_config)
        with run_recorder(self.work / "run", self.config, 0) as recorder:
            self._trainer(engine, recorder).train()
        facts = {"before": before, "after": self._evaluate(), "steps": self.config.train.steps}
        self.run_inputs.require_intact()
        weights = master_weights(engine.deepspeed)
        ranks.on_rank_zero(lambda: self._save(weights, facts))
        engine.destroy()

    def _trainer(self, engine: TrainingEngine, recorder: Recorder) -> Trainer:
        run_inputs, config = self.run_inputs, self.config
        dtype = student_dtype(self.engine_config)
        return Trainer(
            config=config,
            engine=engine,
            prefetcher=run_inputs.prefetcher(config, config.train.seed),
            step_log=StepLogger(config, recorder, self.student, self.student.widths, run_inputs.device, dtype),
            evaluate=functools.partial(self._evaluate, PERIODIC_EVALUATION_SEQUENCES),
        )

    def _evaluate(self, limit: int | None = None) -> dict[str, float]:
        with doing("evaluating the teacher on held-out text"):
            scores = HeldoutScores(self.config, self.run_inputs, self.student.family)
            return scores.of_student(self.student, None, limit)

    def _save(self, weights: dict, facts: dict) -> None:
        facts |= speeds(read_lines(self.work / "run" / METRICS_FILE))
        model = stock_model(weights, self.student, load_config(self.run_inputs.teacher))
        how = f"{facts['steps']} steps of {language_modelling(self.config.data.task)}"
        card = f"# {self.config.teacher.name}, {how} on: {self.run_inputs.corpus.description}\n"
        save_checkpoint(model, self.run_inputs.tokenizer, card, self.work)
        (self.work / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
        write_corrected_checksums(self.work)


def _publish(work: Path, final: Path) -> None:
    if final.exists():  # another job was faster; its result is the same
        shutil.rmtree(work)
    else:
        os.replace(work, final)


def _key(config: RunConfig, engine_config: dict, run_inputs: RunInputs) -> str:
    """Content of everything the corrected weights depend on."""
    settings = correction_key(config)
    settings |= {"dtype": str(student_dtype(engine_config)), "corpus": run_inputs.corpus.fingerprint}
    settings["teacher"] = ranks.on_rank_zero(lambda: _content(run_inputs.teacher))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def _content(teacher: str) -> str:
    """Hash of the weights' and config's bytes; for a hub name the commit that it resolves to."""
    folder = Path(teacher)
    if not folder.is_dir():
        return f"{teacher}@{load_config(teacher)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()
