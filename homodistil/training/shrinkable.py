"""What an event happens to: a student that an engine trains, or a plain one (before step 0, resumed, or tried)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.student import Student
from homodistil.engine.engine import TrainingEngine
from homodistil.models.resize_plan import ResizePlan, slice_module
from homodistil.pruning.compensation.student import EventChange
from homodistil.resize import master_weights, remove_parameters, reset_moments, resize, write_weights
from homodistil.training.micro_batch import MicroBatchPolicy, fit_micro_batch


class Shrinkable(Protocol):
    """A student that loses neurons. Every rank calls every method, with the same arguments.

    What `resize`, `write` and `settle` return are entries of the event's line in events.jsonl.
    """

    student: Student

    def snapshot(self) -> Student:
        """A plain fp32 student with the current weights, to be read only (`duplicate` makes one to work on)."""

    def resize(self, plan: ResizePlan) -> dict[str, float]:
        """Cut weights and optimizer state, and let the student's modules know their new sizes."""

    def keep_layers(self, kept: Sequence[int]) -> dict[str, float]:
        """Let all layers go but `kept` (ascending), with weights, optimizer state and all that is numbered by them."""

    def write(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Overwrite parameters: the student's name -> full fp32 value, alike on every rank."""

    def settle(self, cool_down_steps: int, rate_share: float) -> dict[str, int]:
        """Adapt how training continues at the new widths.

        Args:
            cool_down_steps: 0 unless a milestone is now held.
            rate_share: factor on the learning rate at the new widths.
        """


class PlainStudent:
    """A student that no engine holds."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def snapshot(self) -> Student:
        return self.student

    def resize(self, plan: ResizePlan) -> dict[str, float]:
        slice_module(self.student, plan)
        self.student.after_resize(plan.keep)
        return {}

    def keep_layers(self, kept: Sequence[int]) -> dict[str, float]:
        self.student.keep_layers(kept)
        return {}

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        parameters = dict(self.student.named_parameters())
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        return {}

    def settle(self, cool_down_steps: int, rate_share: float) -> dict[str, int]:
        return {}

    def after(self, change: EventChange) -> Student:
        """The student after `change`."""
        self.resize(change.plan)
        self.write(change.weights)
        return self.student


class LiveStudent:
    """The student of a DeepSpeed engine.

    Args:
        engine: holds the student.
        snapshots: made before the engine took the student; None if nothing will ask for a snapshot.
        carry_moments: False: the optimizer starts anew with every event.
        micro_batch: the size that the new widths allow.
        prefetcher: gives the batches of that size.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        snapshots: StudentSnapshots | None,
        carry_moments: bool,
        micro_batch: MicroBatchPolicy,
        prefetcher: BatchPrefetcher,
    ) -> None:
        self.engine, self._snapshots, self._carry_moments = engine, snapshots, carry_moments
        self._micro_batch, self._prefetcher = micro_batch, prefetcher
        self.student: Student = engine.module

    def snapshot(self) -> Student:
        return self._snapshots.make(master_weights(self.engine.deepspeed), torch.float32)

    def resize(self, plan: ResizePlan) -> dict[str, float]:
        if not self._carry_moments:
            reset_moments(self.engine.deepspeed)
        cost = resize(self.engine.deepspeed, plan)
        self.student.after_resize(plan.keep)
        return {"milliseconds": cost.milliseconds, "bytes_moved": cost.bytes_moved}

    def keep_layers(self, kept: Sequence[int]) -> dict[str, float]:
        if not self._carry_moments:
            reset_moments(self.engine.deepspeed)
        leaving = self.student.layer_parameters(set(range(self.student.num_layers)) - set(kept))
        cost = remove_parameters(self.engine.deepspeed, leaving, lambda: self.student.keep_layers(kept))
        return {"milliseconds": cost.milliseconds, "bytes_moved": cost.bytes_moved}

    def write(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        start_s = time.perf_counter()
        write_weights(self.engine.deepspeed, weights)
        return {"milliseconds_write": (time.perf_counter() - start_s) * 1e3}

    def settle(self, cool_down_steps: int, rate_share: float) -> dict[str, int]:
        micro_batch = fit_micro_batch(self._micro_batch, self.engine, self._prefetcher)  # from the next step on
        self.engine.set_width_share(rate_share)
        self.engine.rewarm()
        if cool_down_steps:
            self.engine.cool_down(cool_down_steps)
        return micro_batch
