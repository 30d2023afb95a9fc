"""One run of the product, measured for a study: both held-out halves, CPU seconds of its training, its FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch
from homodistil.data.rows import Rows
from homodistil.evaluation.heldout import Predict, evaluate
from homodistil.metrics.recorder import METRICS_FILE, read_lines
from homodistil.planning.step_work import run_flops
from homodistil.training.heldout_scores import HeldoutScores
from homodistil.training.inputs import RunInputs
from homodistil.training.run import DistillationRun

PERIODIC_SEQUENCES = 64
"""Held-out blocks of the evaluations during training: what a study looks at there is the gap on the probe."""


CHUNK_BLOCKS = 64
"""Held-out blocks that go to one half together: sources come one after the other, and both halves must have all."""


class Part:
    """Some blocks of a split as rows of their own. `index`: int64, ascending."""

    def __init__(self, rows: Rows, index: np.ndarray) -> None:
        self._rows, self._index = rows, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, ids: np.ndarray | list[int]) -> np.ndarray:
        return self._rows[self._index[np.asarray(ids, dtype=np.int64)]]


def halves(run_inputs: RunInputs, limit: int | None = None) -> tuple[RunInputs, RunInputs]:
    """The same materials held out twice over: VALIDATION (on which learning rates are chosen) and TEST (reported).

    Stretches of CHUNK_BLOCKS blocks go to the one and the other in turn, so a document may reach into both.
    `limit`: at most so many blocks each.
    """
    index = np.arange(len(run_inputs.corpus.heldout))
    in_test = index // CHUNK_BLOCKS % 2 == 1 if len(index) > CHUNK_BLOCKS else index >= len(index) // 2
    parts = (Part(run_inputs.corpus.heldout, index[half][:limit]) for half in (~in_test, in_test))
    corpora = (dataclasses.replace(run_inputs.corpus, heldout=part) for part in parts)
    validation, test = (dataclasses.replace(run_inputs, corpus=corpus) for corpus in corpora)
    return validation, test


class RememberedLogits:
    """The teacher's on held-out batches, which are the same in all runs of a worker: computed by the first."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []

    def of(self, predict: Predict) -> Predict:
        """`predict`, for one walk over the batches from the first on."""
        places = itertools.count()

        def remembered(batch: Batch) -> Tensor:
            place = next(places)
            if place == len(self._logits):
                self._logits.append(predict(batch))
            return self._logits[place]

        return remembered


class CpuClock:
    """CPU seconds of this process inside `counted` functions, without what they spend inside `left_out` ones."""

    def __init__(self) -> None:
        self.counted_s = self._left_out_s = 0.0
        self._inside = False

    def counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            start, left_out = time.process_time(), self._left_out_s
            try:
                return function(*args, **kwargs)
            finally:
                self.counted_s += time.process_time() - start - (self._left_out_s - left_out)

        return call

    def left_out(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if self._inside:  # the outer one counts it already
                return function(*args, **kwargs)
            start, self._inside = time.process_time(), True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self._left_out_s += time.process_time() - start

        return call


class MeasuredRun(DistillationRun):
    """A run whose last evaluation covers both halves (VALIDATION plain, TEST under test/).

    Counted: calibration, one-shot cut, steps, resize events. Left out: measuring the gap, evaluations, checkpoints.

    Args:
        config, engine_config, folder: as of `DistillationRun`.
        both: VALIDATION and TEST, from `halves`.
        remembered: of each half, of a masked teacher: logits of all tokens of a causal one would fill the memory.
    """

    def __init__(
        self,
        config: RunConfig,
        engine_config: dict,
        both: tuple[RunInputs, RunInputs],
        remembered: tuple[RememberedLogits, RememberedLogits],
        folder: Path,
    ) -> None:
        self.clock, self.final = CpuClock(), {}
        self._halves = tuple(zip(both, remembered, strict=True))
        super().__init__(config, engine_config, both[0], folder, "python -m experiments.quality")
        self.gap.measure = self.clock.left_out(self.gap.measure)
        if check := self.shrinker.compensation:
            check.allowed_fixed_dims = self.clock.left_out(check.allowed_fixed_dims)
        self.shrinker.before_training = self.clock.counted(self.shrinker.before_training)

    def build_trainer(self, *args, **kwargs):
        trainer = super().build_trainer(*args, **kwargs)
        trainer.between_steps = self.clock.left_out(trainer.between_steps)
        trainer.train = self.clock.counted(trainer.train)
        return trainer

    def evaluate(self, limit: int | None = None) -> dict[str, float]:
        if limit is not None:
            return super().evaluate(min(limit, PERIODIC_SEQUENCES))
        validation, test = (self._evaluate_half(*half) for half in self._halves)
        self.final = validation | {f"test/{name}": value for name, value in test.items()}
        return self.final

    def _evaluate_half(self, half: RunInputs, remembered: RememberedLogits) -> dict[str, float]:
        if self.student.family.is_causal or not half.with_head:
            return HeldoutScores(self.config, half, self.student.family).of_student(self.student, self.teacher)
        teacher = remembered.of(self.teacher.predict)
        return evaluate(self.student.predict, teacher, half.heldout(self.config), half.device)

    def measured(self) -> dict:
        """What the study keeps of the run, once it has ended."""
        tokens = self.config.train.steps * self.config.train.global_batch_size * self.config.data.seq_len
        return {
            "validation": {name: value for name, value in self.final.items() if "/" not in name},
            "test": {n.removeprefix("test/"): value for n, value in self.final.items() if n.startswith("test/")},
            "parameters": self.student.num_parameters(),
            "hidden_size": self.student.widths["hidden"],
            "cpu_s": self.clock.counted_s,
            "tokens": tokens,
            "tokens_per_cpu_s": tokens / self.clock.counted_s,
            "flops": self._training_flops() + self._calibration_flops(),
        }

    def _training_flops(self) -> float:
        """Student and teacher, from the logged intervals of metrics.jsonl. Blocks count as full."""
        per_step = self.config.train.global_batch_size * self.config.data.seq_len
        total, before = 0.0, 0
        for line in read_lines(self.folder / METRICS_FILE):
            if line["kind"] == "train":
                per_token = line["speed/model_tflops"] * 1e12 / line["speed/tokens_per_s"]
                total += per_token * per_step * (line["step"] - before)
                before = line["step"]
        return total

    def _calibration_flops(self) -> float:
        """One-shot pruning looks at some batches at full width first."""
        config = self.config
        if config.pruning.schedule != "one_shot":
            return 0.0
        one = run_flops(self.resolved, self.teacher_widths, config.train.global_batch_size)
        return config.pruning.calibration_batches * one.total
