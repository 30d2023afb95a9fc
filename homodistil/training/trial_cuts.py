"""What the closed loop and `teacher_kl` ask of a live engine, answered on plain copies of its student."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from homodistil.data.masked_lm import Batch
from homodistil.distill.snapshot import StudentSnapshots, duplicate
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.models.axes import Keep
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.pruning.calibration import calibrate, drawn_label_loss
from homodistil.pruning.importance import Importance
from homodistil.resize import master_weights

Cut = Callable[[Student, Keep], Student]
"""A plain student (to be used up) and what stays -> the student that this event would leave."""


def plain_cut(student: Student, keep: Keep) -> Student:
    """By selection alone, in place."""
    plan = make_plan(student.axis_table(), keep)
    slice_module(student, plan)
    student.after_resize(plan.keep)
    return student


class GapLook:
    """The gap at one moment (pruning.scheduler.Look).

    Args:
        copy_student: a plain copy of the live one, as `cut` wants it.
        cut: what an event does; gives a student in the dtype of the live one, so that a trial gives the number that
            the event will.
    """

    def __init__(self, gap: GapProbe, copy_student: Callable[[], Student], cut: Cut = plain_cut) -> None:
        self.kl = gap.measure()["kl"]
        self._gap, self._copy_student, self._cut = gap, copy_student, cut
        self._copy: Student | None = None

    def kl_after(self, keep: Keep) -> float:
        """KL to the teacher on the probe (nats) after this cut. Every rank calls it."""
        if self._copy is None:  # not made before anybody asks: it holds all weights on every rank
            self._copy = self._copy_student()
        return self._gap.kl_of(self._cut(duplicate(self._copy), keep))


def live_copy(engine, copies: StudentSnapshots, dtype: torch.dtype) -> Student:
    """The engine's student as a plain module. Every rank calls it."""
    return copies.make(master_weights(engine), dtype)


def score_by_drawn_labels(
    importance: Importance,
    student: Student,
    teacher: Teacher,
    steps: Iterator[list[Batch]],
    seed: tuple[int, int],
) -> None:
    """`teacher_kl`: feed `importance` from a plain fp32 student, whose gradients are left cleared.

    Args:
        seed: of the run, and the updates done: a resumed run draws the same labels.
    """
    of_run, step = seed
    loss = drawn_label_loss(student, teacher, (of_run * 1_000_003 + step) * 4096 + ranks.rank())
    calibrate(importance, student, student.axis_table(), steps, loss)
