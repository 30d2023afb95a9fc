"""Cuts that are only tried, on plain copies of the student: what the closed loop looks at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from homodistil.distill.snapshot import duplicate
from homodistil.distill.student import Student
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.models.axes import Widths
from homodistil.pruning.compensation.student import EventChange
from homodistil.training.shrinkable import PlainStudent, Shrinkable


class TrialCuts:
    """The gap to the teacher at one moment (a `pruning.schedule_protocol.Look`).

    Args:
        gap: of the student of `target`.
        target: whose student is copied; it is not changed.
        prepare: plain student, widths that are due -> the event that would lead there.
        dtype: what the live student computes in: a trial gives the number that the event will.
    """

    def __init__(
        self,
        gap: GapProbe,
        target: Shrinkable,
        prepare: Callable[[Student, Widths], EventChange],
        dtype: torch.dtype,
    ) -> None:
        self._gap, self._target, self._prepare, self._dtype = gap, target, prepare, dtype
        self._copy: Student | None = None

    def kl(self) -> float:
        return self._gap.measure()[self._gap.distance]

    def kl_after(self, due: Widths) -> float:
        if self._copy is None:  # not made before anybody asks: it holds all weights on every rank
            self._copy = self._target.snapshot()
        trial = duplicate(self._copy)
        cut = PlainStudent(trial).after(self._prepare(trial, due))
        return self._gap.distance_of(cut.to(self._dtype))
