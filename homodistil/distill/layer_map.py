"""Layer map between teacher and student, and the size of the projections between them.

From configurations alone, so that what does not fit is refused before weights are loaded.
"""

from __future__ import annotations

from typing import NamedTuple

from homodistil.config.schema import LossConfig, PruningConfig, StudentConfig
from homodistil.errors import UserError


class LayerMap(NamedTuple):
    """What a student knows of the teacher that it is compared with."""

    hidden_size: int
    num_heads: int
    """Heads of every layer. Head i of a student that was not cut out of the teacher is compared with head i."""
    layers: tuple[int, ...]
    """Teacher layer that each layer of the student is compared with, ascending; the last one is the teacher's last."""
    is_origin: bool = True
    """The student starts with this teacher's weights: every W between the two starts as the identity."""
    keeps_width: bool = False
    """Both residual streams are equally wide for the whole run, and made of the same dims."""


def layer_map_of(student: StudentConfig, pruning: PruningConfig, teacher) -> LayerMap:
    """The counterpart of the run's student. `teacher`: its Hugging Face configuration. Raises as `check_student`."""
    is_origin = student.init == "teacher"
    return LayerMap(
        teacher.hidden_size,
        teacher.num_attention_heads,
        compared_layers(student, teacher.num_hidden_layers),
        is_origin,
        keeps_width=is_origin and pruning.schedule == "none",
    )


def num_student_layers(student: StudentConfig, num_teacher_layers: int) -> int:
    return num_teacher_layers if student.num_hidden_layers is None else student.num_hidden_layers


def compared_layers(student: StudentConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer of each student layer m, of M: (m + 1) x N / M - 1 (TinyBERT's uniform map, section 4.1).

    Raises:
        UserError: N is not a multiple of M.
    """
    num_layers = num_student_layers(student, num_teacher_layers)
    if num_layers < 1 or num_teacher_layers % num_layers:
        allowed = [n for n in range(1, num_teacher_layers + 1) if num_teacher_layers % n == 0]
        raise UserError(
            f"student.num_hidden_layers: found {num_layers}, the teacher has {num_teacher_layers}; allowed are its "
            f"divisors {', '.join(map(str, allowed))} (each student layer answers for equally many of the teacher's)"
        )
    step = num_teacher_layers // num_layers
    return tuple((m + 1) * step - 1 for m in range(num_layers))


def copied_layers(student: StudentConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layers that a student with init=teacher starts from: init_layers, or every (N / M)-th from the first.

    The latter is "one layer out of two" of DistilBERT (arXiv 1910.01108, section 3).

    Raises:
        UserError: not as many as the student has layers, not ascending, or not among the teacher's.
    """
    num_layers = num_student_layers(student, num_teacher_layers)
    if not student.init_layers:
        return tuple(m * (num_teacher_layers // num_layers) for m in range(num_layers))
    layers = student.init_layers
    ascending = all(low < high for low, high in zip(layers, layers[1:], strict=False))
    if len(layers) != num_layers or not ascending or layers[0] < 0 or layers[-1] >= num_teacher_layers:
        raise UserError(
            f"student.init_layers: found {layers}; give {num_layers} (student.num_hidden_layers) different layers in "
            f"ascending order, each of 0 .. {num_teacher_layers - 1}"
        )
    return tuple(layers)


def check_student(student: StudentConfig, pruning: PruningConfig, loss: LossConfig, num_teacher_layers: int) -> None:
    """Raises `UserError` when the student cannot start as the config says."""
    compared_layers(student, num_teacher_layers)
    copied_layers(student, num_teacher_layers)
    if student.init == "teacher":
        return
    if pruning.schedule != "none":
        raise UserError(
            f"pruning.schedule: found {pruning.schedule}; a student of student.init=random has its target size "
            f"from the start, so set pruning.schedule=none (or student.init=teacher)"
        )
    if student.init_layers:
        raise UserError(
            f"student.init_layers: found {student.init_layers}, but student.init=random copies no layers; "
            f"leave it empty, or set student.init=teacher"
        )
    if not loss.projection_learned:
        raise UserError(
            "loss.projection_learned: false keeps W the selection of surviving dims, and a student of "
            "student.init=random has none of the teacher's; set loss.projection_learned=true"
        )
