"""From what a step leaves behind to what is logged: means over ranks, speed, widths, memory; and the finite check."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from homodistil import ranks
from homodistil.config import RunConfig
from homodistil.data.masking import Batch
from homodistil.distill.objective import LossTerms
from homodistil.distill.student import Student
from homodistil.errors import CheckFailed
from homodistil.flops import peak_flops, step_flops
from homodistil.metrics import Recorder, StepTimer, memory_bytes
from homodistil.resize import step_applied


class Monitor:
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
        self.timer = StepTimer()
        self._micro_batches: list[dict[str, Tensor]] = []

    def see(self, terms: LossTerms) -> None:
        self._micro_batches.append({"total": terms.total.detach(), **terms.terms})

    def end_step(self, step: int, batches: list[Batch], engine) -> None:
        """Count the step; log it when it is due. Every rank calls it."""
        counts, parts = batches[0].counts, len(batches) * ranks.world_size()
        self.timer.count(counts.tokens * parts, self._flops(counts.masked_rows * parts))
        if step % self.config.train.log_every_steps == 0 or step == self.config.train.steps:
            values = self._losses()
            require_finite(values, step, self.config)
            self.recorder.log_step(step, values | self._engine_values(engine) | self._size() | self._speed())
        self._micro_batches.clear()

    def _losses(self) -> dict[str, float]:
        """Each term: mean over micro-batches and ranks, which is the mean over the global batch (see feed.py)."""
        names = self._micro_batches[0]
        own = {name: torch.stack([m[name] for m in self._micro_batches]).double().mean() for name in names}
        return {f"loss/{name}": value for name, value in ranks.mean_of(own, self.device).items()}

    def _engine_values(self, engine) -> dict[str, float]:
        values = {"optim/lr": engine.get_lr()[0], "train/micro_batch_size": engine.train_micro_batch_size_per_gpu()}
        norm = engine.get_global_grad_norm()
        return values if norm is None else values | {"optim/grad_norm": float(norm)}

    def _size(self) -> dict[str, float]:
        widths = {f"widths/{axis}": width for axis, width in self.student.widths.items()}
        return widths | {"model/parameters": self.student.num_parameters()}

    def _speed(self) -> dict[str, float]:
        lap = self.timer.lap()
        values = {"speed/tokens_per_s": lap.tokens_per_s, "speed/model_tflops": lap.flops_per_s / 1e12}
        values["speed/mfu"] = lap.flops_per_s / (self.peak.flops_per_s * ranks.world_size())
        return values | {name: float(value) for name, value in memory_bytes().items()}

    def _flops(self, masked_rows: float) -> float:
        return step_flops(
            self.student.widths,
            self.teacher_widths,
            self.student.objective.config,
            num_sequences=self.config.train.global_batch_size,
            seq_len=self.config.data.seq_len,
            masked_rows=masked_rows,
            vocab_size=self.student.model.config.vocab_size,
        ).total


def require_finite(terms: dict[str, float], step: int, config: RunConfig) -> None:
    """Stop with the names of the terms that are not finite. The values are the same on every rank, so all stop."""
    bad = [name.removeprefix("loss/") for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        # The single terms say more than their sum.
        named = [name for name in bad if name != "total"] or bad
        raise CheckFailed(
            f"loss: {', '.join(named)} is not finite at step {step}; training stops, the last checkpoint is kept. "
            f"Lower train.lr ({config.train.lr:g}), lengthen train.warmup_fraction or lower that term's weight"
        )


def require_applied(engine, step: int, config: RunConfig) -> None:
    """Stop when DeepSpeed has left out a step because the gradient's norm is not finite: it does so without a word.

    Call behind `engine.step()` at a boundary. The norm is the same on every rank, so all stop. Under fp16 with dynamic
    loss scaling a skipped step is how the scale finds its place, and DeepSpeed reports it.

    Raises:
        CheckFailed: the step was left out, and no loss scale could have been the reason.
    """
    if step_applied(engine) or (engine.fp16_enabled() and engine.dynamic_loss_scale()):
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
    logged = [line["speed/tokens_per_s"] for line in metrics if line.get("kind") == "train"]
    logged = [value for value in logged if value is not None]
    if not logged:
        return {"tokens_per_s_first": None, "tokens_per_s_last": None}
    ends = torch.tensor(logged[:5]), torch.tensor(logged[-5:])
    return {"tokens_per_s_first": float(ends[0].median()), "tokens_per_s_last": float(ends[1].median())}


def run_recorder(folder: Path, config: RunConfig, start_step: int) -> Recorder:
    """The recorder of this rank."""
    return Recorder(folder, config.train.steps, start_step, enabled=ranks.rank() == 0)
