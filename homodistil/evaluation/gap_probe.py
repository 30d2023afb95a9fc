"""Measures the teacher-student gap on a fixed held-out batch: a resize event raises it, training lowers it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from homodistil.data.batch import Batch
from homodistil.data.prefetch import mean_counts
from homodistil.distill.objective import Objective
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks

PROBE_SEQUENCES = 48
"""Sequences of the probe over all ranks: shows differences of a few per cent, and is cheap enough for every event."""


class GapProbe:
    """Measures the MLM, KL, hidden, attention and embedding terms, in total and per layer.

    KL, MLM and attention are measured even if their weight in the run is 0. The hidden and embedding terms need
    projections, so they are measured only in runs that train with these terms.

    Args:
        batches: held-out batches of this rank, the same for every measurement.
    """

    def __init__(self, student: Student, teacher: Teacher, batches: Iterable[Batch], device: torch.device) -> None:
        self.student, self.teacher = student, teacher
        batches = list(batches)
        counts = mean_counts(batches, device)
        self.batches = [batch._replace(counts=counts).to(device) for batch in batches]
        measured = dataclasses.replace(student.objective.config, mlm=1.0, kl=1.0, kl_positions="masked", attention=1.0)
        self.objective = Objective(measured)
        self.kl_alone = Objective(measured.only(kl=1.0))

    def measure(self) -> dict[str, float]:
        """Term -> mean over the probe, the same on every rank. "total" is their sum with the weights of the run.

        Every rank calls it.
        """
        sums = self._sums(self.student, self.objective)
        weights = self.student.objective.weights
        sums["total"] = sum(weight * sums[name] for name, weight in weights.items())
        return ranks.mean_of(sums, self.batches[0].input_ids.device)

    def kl_of(self, student: Student) -> float:
        """The term "kl" of `measure` (nats) for another `student`. Every rank calls it."""
        sums = self._sums(student, self.kl_alone)
        return ranks.mean_of({"kl": sums["kl"]}, self.batches[0].input_ids.device)["kl"]

    @torch.no_grad()
    def _sums(self, student: Student, objective: Objective) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for batch in self.batches:
            terms = student.compare(batch, self.teacher(batch), objective).terms
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / len(self.batches)
        return sums
