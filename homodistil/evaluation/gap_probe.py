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

    KL, MLM and attention are measured even if their weight in the run is 0; of models without a language-modelling
    head, attention alone; where the teacher's outputs are stored, none of these. The hidden and embedding terms need
    projections, so they are measured only in runs that train with these terms.

    Args:
        batches: held-out batches of this rank, the same for every measurement.
    """

    def __init__(self, student: Student, teacher: Teacher, batches: Iterable[Batch], device: torch.device) -> None:
        self.student, self.teacher = student, teacher
        batches = list(batches)
        counts = mean_counts(batches, device)
        self.batches = [batch._replace(counts=counts).to(device) for batch in batches]
        has_head = student.family.has_head(student.model)
        measured = student.objective.config
        if teacher.shows_layers:
            measured = dataclasses.replace(measured, attention=1.0)
        if has_head:
            measured = dataclasses.replace(measured, mlm=1.0, kl=1.0, kl_positions="masked")
        self.objective = Objective(measured)
        self.distance = "kl" if has_head else "total"
        """The one number of `measure` that says how far the student is: the KL (nats); without a head, the total."""
        self._distance_alone = Objective(measured.only(kl=1.0)) if has_head else student.objective

    def measure(self) -> dict[str, float]:
        """Term -> mean over the probe, the same on every rank. "total" is their sum with the weights of the run.

        Every rank calls it.
        """
        sums = self._sums(self.student, self.objective)
        sums["total"] = self._total(sums)
        return ranks.mean_of(sums, self.batches[0].input_ids.device)

    def distance_of(self, student: Student) -> float:
        """`distance` of `measure` for another `student`. Every rank calls it."""
        sums = self._sums(student, self._distance_alone)
        value = sums["kl"] if self.distance == "kl" else self._total(sums)
        return ranks.mean_of({self.distance: value}, self.batches[0].input_ids.device)[self.distance]

    def _total(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(weight * sums[name] for name, weight in self.student.objective.weights.items())

    @torch.no_grad()
    def _sums(self, student: Student, objective: Objective) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for batch in self.batches:
            terms = student.compare(batch, self.teacher(batch), objective).terms
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / len(self.batches)
        return sums
