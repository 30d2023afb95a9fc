"""FLOPs of every part of a step, counted once, as `homodistil.distill.cost` counts those of the whole step."""

from __future__ import annotations

import dataclasses

from homodistil.config.schema import LossConfig
from homodistil.distill.cost import step_flops
from homodistil.models.axes import Widths


def part_flops(student: Widths, teacher: Widths, loss: LossConfig, **batch: float) -> dict[str, float]:
    """Part (as in `step_parts`) -> FLOPs of one step over the whole global batch. Their sum is `step_flops(...).total`.

    "student" is its forward pass with that of the losses; its backward is twice its forward. Of the losses, everything
    that is not their forward counts as backward, though some kernels compute gradients in forward: the rates of these
    two parts shade into each other.

    Args:
        batch: `num_sequences`, `seq_len`, `target_rows`, `vocab_size`, as for `step_flops`.
    """
    whole = step_flops(student, teacher, loss, **batch)
    forward = _projections(student, teacher, loss, batch) + _scores(student, teacher, loss, batch)
    return {
        "teacher": whole.teacher,
        "student": whole.student / 3 + forward,
        "backward": whole.student * 2 / 3 + whole.losses - forward,
    }


def _projections(student: Widths, teacher: Widths, loss: LossConfig, batch: dict[str, float]) -> float:
    # A frozen W on the teacher's side has no backward at all.
    forward_only = dataclasses.replace(loss, attention=0.0, projection="teacher", projection_learned=False)
    return step_flops(student, teacher, forward_only, **batch).losses


def _scores(student: Widths, teacher: Widths, loss: LossConfig, batch: dict[str, float]) -> float:
    """q.k of both models once; the student's backward is two products more."""
    scores_only = dataclasses.replace(loss, hidden=0.0, embedding=0.0)
    no_teacher = {axis: 0 if axis.endswith(".qk_dim") else width for axis, width in teacher.items()}
    with_backward = step_flops(student, no_teacher, scores_only, **batch).losses
    return step_flops(student, teacher, scores_only, **batch).losses - with_backward * 2 / 3
