"""From what a step leaves behind to what is logged: means over ranks, speed, widths, memory; and the finite check.

A step that is not logged leaves tensors behind and is not waited for. A logged one brings all of them from the device
in one transfer, behind one all-reduce.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch, LossCounts
from homodistil.distill.cost import step_flops
from homodistil.distill.objective import LossTerms
from homodistil.distill.student import Student
from homodistil.distributed import ranks
from homodistil.engine.engine import TrainingEngine
from homodistil.errors import CheckFailed
from homodistil.metrics.device_peak import peak_flops
from homodistil.metrics.recorder import Recorder, StepTimer, memory_bytes
from homodistil.metrics.tensorboard_layout import compared_run
from homodistil.metrics.term_labels import term_label
from homodistil.metrics.trackers.registry import open_trackers
from homodistil.metrics.trackers.tracker import TrackedRun
from homodistil.models.axes import Widths
from homodistil.training.event_rise import EventRises
from homodistil.training.loss_balance import Balance


class _Step(NamedTuple):
    """An optimizer step that waits to be logged."""

    num_batches: int
    """Micro-batches over all ranks."""
    counts: LossCounts
    """Counts of a micro-batch, on the device."""
    widths: Widths


class _Read(NamedTuple):
    """What a logged step brings to the host."""

    losses: dict[str, float]
    target_rows: list[float]
    """Over the whole global batch, for each step since the last logged one."""
    tokens: list[float]
    grad_norm: float | None
    data_wait_s: float


class StepLogger:
    """Collects the micro-batches of a step and writes every `train.log_every_steps`-th.

    Args:
        recorder: writes on rank 0, silent elsewhere.
        teacher_widths: for the FLOPs; the student's own widths when there is no teacher.
        vocab_size: rows of the decoder.
        dtype: the engine's, for the peak that the MFU refers to.
    """

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        student: Student,
        teacher_widths: dict[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.recorder, self.student = config, recorder, student
        self.teacher_widths, self.device = teacher_widths, device
        self.peak = peak_flops(device, dtype)
        loss = student.objective.config
        self._balance = Balance(config.run.name, loss.weights, loss.extra, config.data.task)
        self._rises = EventRises(loss, self._balance, config.data.task)
        self.timer = StepTimer()
        self._micro_batches: list[dict[str, Tensor]] = []
        self._steps: list[_Step] = []
        self._kept, self._widths, self._num_parameters = None, {}, 0
        self._is_behind_event = False
        """Whether the first step is the one behind an event: where the run was resumed from."""
        self._data_wait_s = 0.0

    def add(self, terms: LossTerms) -> None:
        self._micro_batches.append({"total": terms.total.detach(), **terms.terms})

    def end_step(self, step: int, batches: list[Batch], engine: TrainingEngine, data_wait_s: float = 0.0) -> None:
        """Count the step; log it when it is due. Every rank calls it.

        Args:
            data_wait_s: seconds that this rank has waited for data so far (`BatchPrefetcher.wait_s`).
        """
        if self._note_widths():
            self._rises.hold(step, self._means(self._rises.names))
        self._steps.append(_Step(len(batches) * ranks.world_size(), batches[0].counts, self._widths))
        if step % self.config.train.log_every_steps == 0 or step == self.config.train.steps:
            self._log(step, engine, data_wait_s)
            self._steps.clear()
        self._micro_batches.clear()
        self.recorder.advance(step)

    def _note_widths(self) -> bool:
        """They change with a resize event alone, which gives the student another `kept`.

        Returns:
            Whether this is the step behind one.
        """
        if self._kept is self.student.origins:
            return False
        is_behind_event, self._kept, self._widths = self._is_next_behind(), self.student.origins, self.student.widths
        self._num_parameters = self.student.num_parameters()
        return is_behind_event

    def _is_next_behind(self) -> bool:
        """Whether an event lies between the last step and the next one."""
        return self._is_behind_event if self._kept is None else self._kept is not self.student.origins

    def state_dict(self) -> dict:
        """What the lines of a resumed run depend on, as JSON values. Every rank calls it."""
        if held := self._rises.held:
            self._rises.receive(ranks.mean(torch.cat(held)).tolist())
        return {"rises": self._rises.state_dict(), "is_behind_event": self._is_next_behind()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rises.load_state_dict(state["rises"])
        self._is_behind_event = state["is_behind_event"]

    def _means(self, names: Sequence[str]) -> Tensor:
        """Means of terms over the micro-batches of this step on this rank, float64 (names,)."""
        terms = torch.stack([terms[name] for terms in self._micro_batches for name in names])
        return terms.double().view(-1, len(names)).mean(0)

    def _log(self, step: int, engine: TrainingEngine, data_wait_s: float) -> None:
        read = self._read(engine.gradient_norm, data_wait_s - self._data_wait_s)
        self._data_wait_s = data_wait_s
        require_finite(read.losses, step, self.config)
        values = {"optim/lr": engine.learning_rate, "train/micro_batch_size": engine.micro_batch_size}
        values |= {} if read.grad_norm is None else {"optim/grad_norm": read.grad_norm}
        shares = {f"share/{name}": share for name, share in self._balance.shares(read.losses).items()}
        shares |= {f"event_rise/{name}": ratio for name, ratio in self._rises.ratios().items()}
        self.recorder.log_step(step, read.losses | shares | values | self._size() | self._speed(read))
        self._tell(step, read)

    def _tell(self, step: int, read: _Read) -> None:
        """What is to be said of the terms, and what the next events are compared with."""
        widths = self._steps[-1].widths
        is_cut = any(width < self.teacher_widths[axis] for axis, width in widths.items())
        lines = self._balance.lines(step, read.losses, widths["hidden"], is_cut)
        lines += self._rises.lines()
        self._rises.end(step, read.losses, is_cut)
        if not self.recorder.enabled:
            return
        for line in lines:
            tqdm.write(line)  # above a progress bar, where there is one
        sys.stdout.flush()

    def _read(self, grad_norm: float | Tensor | None, data_wait_s: float) -> _Read:
        """Each term: mean over micro-batches and ranks, which is the mean over the global batch (see prefetch.py)."""
        # One vector and one reduction for everything: [terms, also behind events, (rows, tokens) per step, norm, wait].
        names, held = list(self._micro_batches[0]), self._rises.held
        counts = [count for step in self._steps for count in (step.counts.target_rows, step.counts.tokens)]
        further = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in (grad_norm or 0.0, data_wait_s)]
        sums = [self._means(names), *held, torch.stack(counts).double(), torch.stack(further)]
        *values, norm, wait_s = ranks.mean(torch.cat(sums)).tolist()
        num_terms, num_held = len(names), sum(map(len, held))
        self._rises.receive(values[num_terms : num_terms + num_held])
        # Behind the terms, rows and tokens alternate.
        rows, tokens = values[num_terms + num_held :: 2], values[num_terms + num_held + 1 :: 2]
        return _Read(
            {f"loss/{name}": value for name, value in zip(names, values[:num_terms], strict=True)},
            [mean * step.num_batches for mean, step in zip(rows, self._steps, strict=True)],
            [mean * step.num_batches for mean, step in zip(tokens, self._steps, strict=True)],
            None if grad_norm is None else norm,
            wait_s,
        )

    def _size(self) -> dict[str, float]:
        widths = {f"widths/{axis}": width for axis, width in self._widths.items()}
        return widths | {"model/parameters": self._num_parameters}

    def _speed(self, read: _Read) -> dict[str, float]:
        lap = self.timer.lap(sum(read.tokens), self._flops(read.target_rows))
        values = {"speed/tokens_per_s": lap.tokens_per_s, "speed/model_tflops": lap.flops_per_s / 1e12}
        values["speed/mfu"] = lap.flops_per_s / (self.peak.flops_per_s * ranks.world_size())
        values["speed/data_wait_fraction"] = read.data_wait_s / lap.seconds
        return values | {name: float(value) for name, value in memory_bytes().items()}

    def _flops(self, target_rows: list[float]) -> float:
        """FLOPs of all steps since the last logged one. At the same widths they are linear in the rows: looked up
        once."""
        total = 0.0
        for _, same in groupby(zip(self._steps, target_rows, strict=True), key=lambda pair: id(pair[0].widths)):
            steps, rows = zip(*same, strict=True)
            total += len(steps) * self._step_flops(steps[0].widths, sum(rows) / len(rows))
        return total

    def _step_flops(self, widths: Widths, target_rows: float) -> float:
        return step_flops(
            widths,
            self.teacher_widths,
            self.student.objective.config,
            num_sequences=self.config.train.global_batch_size,
            seq_len=self.config.data.seq_len,
            target_rows=target_rows,
            vocab_size=self.student.model.config.vocab_size,
            architecture=self.student.family.architecture,
            runs_teacher=not self.config.teacher.is_stored,
        ).total


def require_finite(terms: dict[str, float], step: int, config: RunConfig) -> None:
    """Stop with the names of the terms that are not finite. The values are the same on every rank, so all stop."""
    bad = [name.removeprefix("loss/") for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        # The single terms say more than their sum.
        named = [term_label(name, config.data.task) for name in bad if name != "total"] or bad
        raise CheckFailed(
            f"loss: {', '.join(named)} is not finite at step {step}; training stops, the last checkpoint is kept. "
            f"Lower train.lr ({config.train.lr:g}), lengthen train.warmup_fraction or lower that term's weight"
        )


def require_applied(engine: TrainingEngine, step: int, config: RunConfig) -> None:
    """Stop when DeepSpeed has left out a step because the gradient's norm is not finite: it does so silently.

    Call right after `engine.update()`. The norm is the same on every rank, so all stop. Under fp16 with dynamic
    loss scaling a skipped step is how the scale finds its place, and DeepSpeed reports it.

    Raises:
        CheckFailed: the step was left out, and no loss scale could have been the reason.
    """
    if engine.is_applied or engine.has_dynamic_loss_scale:
        return
    raise CheckFailed(
        f"gradients are not finite at step {step}, so it was not applied; training stops, the last checkpoint is kept. "
        f"Lower train.lr ({config.train.lr:g}) or lengthen train.warmup_fraction"
    )


def speeds(metrics: list[dict]) -> dict[str, float | None]:
    """tokens_per_s_first and _last: medians of the first and last five logged intervals (None: nothing logged).

    Args:
        metrics: lines of metrics.jsonl.
    """
    logged = [line.get("speed/tokens_per_s") for line in metrics if line.get("kind") == "train"]
    logged = [value for value in logged if value is not None]
    if not logged:
        return {"tokens_per_s_first": None, "tokens_per_s_last": None}
    ends = torch.tensor(logged[:5]), torch.tensor(logged[-5:])
    return {"tokens_per_s_first": float(ends[0].median()), "tokens_per_s_last": float(ends[1].median())}


def run_recorder(
    folder: Path, config: RunConfig, start_step: int, num_lines: Mapping[str, int] | None = None
) -> Recorder:
    """The recorder of this rank, on rank 0 with run.trackers.

    Args:
        num_lines: those that the checkpoint to resume from knows of.
    """
    is_first = ranks.rank() == 0
    trackers = open_trackers(config.run.trackers, _tracked_run(folder, config)) if is_first else []
    return Recorder(folder, config.train.steps, start_step, is_first, num_lines, trackers)


def _tracked_run(folder: Path, config: RunConfig) -> TrackedRun:
    """A control is named behind its run, as in `quickstart/one_shot`."""
    compared = compared_run(folder)
    name = f"{compared.name}/{config.run.name}" if compared else config.run.name
    return TrackedRun(folder, name, config.to_dict())
