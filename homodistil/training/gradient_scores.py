"""One step's importance: from the gradients of a training step, or from labels drawn from the teacher."""

from __future__ import annotations

from collections.abc import Iterator

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.engine.engine import TrainingEngine
from homodistil.models.axes import AxisTable, Keep
from homodistil.models.classifier import LogitKind
from homodistil.models.sentence_head import PoolingMode
from homodistil.pruning.calibration import (
    calibrate,
    drawn_direction_loss,
    drawn_label_loss,
    drawn_logit_loss,
    drawn_vector_loss,
)
from homodistil.pruning.importance import Importance
from homodistil.resize import gradient_fragments


def measure_importance(
    engine: TrainingEngine, importance: Importance, table: AxisTable, shapes: dict[str, tuple[int, ...]]
) -> Keep:
    """Scores of this step by axis, alike on all ranks. Every rank calls it, between `accumulate` of the last
    micro-batch and `update`, and only there: earlier the gradients are not reduced yet, later they are clipped or
    freed. Nothing is taken in before `importance.accept`.

    Args:
        table: axes at their current widths.
        shapes: of the parameters now.
    """
    scored = {use.parameter for use in table.uses if use.scored}
    return importance.measure(gradient_fragments(engine.deepspeed, scored), table, shapes)


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
    loss = drawn_label_loss(student, teacher, _seed_here(seed))
    calibrate(importance, student, student.axis_table(), steps, loss)


def score_by_drawn_directions(
    importance: Importance,
    student: Student,
    steps: Iterator[list[Batch]],
    seed: tuple[int, int],
    pooling: PoolingMode | None = None,
    logits: LogitKind | None = None,
) -> None:
    """Feed `importance` from a plain fp32 copy of a teacher without a language-modelling head, whose gradients are left
    cleared.

    Args:
        seed: as in `score_by_drawn_labels`.
        pooling: of a sentence embedder, whose vectors then count instead of each token's states.
        logits: of a classifier, whose logits then count.
    """
    draws = _seed_here(seed)
    if logits is not None:
        loss = drawn_logit_loss(student, logits, draws)
    else:
        loss = drawn_direction_loss(student, draws) if pooling is None else drawn_vector_loss(student, pooling, draws)
    calibrate(importance, student, student.axis_table(), steps, loss)


def _seed_here(seed: tuple[int, int]) -> int:
    """Of this rank."""
    of_run, step = seed
    return (of_run * 1_000_003 + step) * 4096 + ranks.rank()
