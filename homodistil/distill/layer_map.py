"""Layer map between teacher and student, and the size of the projections between them.

From configurations alone, so that what does not fit is refused before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def last_of_blocks(layers: Sequence[int], num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer that each of the student's is compared with, where those that stayed are the teacher's `layers`.

    A layer stands for itself and for those behind it that have left: it is compared with the last teacher layer before
    the next one that stayed, and the last layer always with the teacher's last. Where layers are spread evenly this is
    `compared_layers`.

    Args:
        layers: ascending; 0 is the first.
    """
    return tuple(following - 1 for following in (*layers[1:], num_teacher_layers))


def layer_map_of(student: StudentConfig, pruning: PruningConfig, teacher) -> LayerMap:
    """The counterpart of the run's student. `teacher`: its Hugging Face configuration. Raises as `check_student`."""
    is_origin, whole = student.init == "teacher", tuple(range(teacher.num_hidden_layers))
    return LayerMap(
        teacher.hidden_size,
        teacher.num_attention_heads,
        whole if starts_whole(student, pruning) else compared_layers(student, teacher.num_hidden_layers),
        is_origin,
        keeps_width=is_origin and pruning.schedule == "none",
    )


def starts_whole(student: StudentConfig, pruning: PruningConfig) -> bool:
    """Whether the student starts with all of the teacher's layers, some of which leave in events (depth_schedule.py),
    and not as a copy that has its final layers from the start: where the events have to choose layers, come in turns,
    or compensate for what leaves. A copy without the teacher's first layer has nothing that could make up for it."""
    if _chooses_in_events(student, pruning):
        return True
    leaves = student.init == "teacher" and student.num_hidden_layers is not None
    return leaves and pruning.compensation != "none" and student.init_layers[:1] in ([], [0])


def _chooses_in_events(student: StudentConfig, pruning: PruningConfig) -> bool:
    return student.layer_choice == "influence" or pruning.depth_schedule == "linear"


def starting_layers(student: StudentConfig, pruning: PruningConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layers that a copy starts with: `copied_layers`, or all of them. Raises as `copied_layers`."""
    copied = copied_layers(student, num_teacher_layers)
    return tuple(range(num_teacher_layers)) if starts_whole(student, pruning) else copied


def num_student_layers(student: StudentConfig, num_teacher_layers: int) -> int:
    return num_teacher_layers if student.num_hidden_layers is None else student.num_hidden_layers


def compared_layers(student: StudentConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer of each student layer m, of M: the last one of the block that it stands for (`_blocks`).

    (m + 1) x N / M - 1, to the nearest: TinyBERT's uniform map (section 4.1) wherever M divides N. It depends on the
    two depths alone, whatever layers a copy starts from.

    Raises:
        UserError: no layers, or more than the teacher has.
    """
    return tuple(layer - 1 for layer in _blocks(student, num_teacher_layers)[1:])


def copied_layers(student: StudentConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layers that a student with init=teacher starts from: init_layers, or the first one of each block.

    The latter, m x N / M to the nearest, is "one layer out of two" of DistilBERT (arXiv 1910.01108, section 3) at half
    the depth.

    Raises:
        UserError: no layers, or more than the teacher has; init_layers that are not as many as the student's layers,
            not ascending, or not among the teacher's.
    """
    blocks = _blocks(student, num_teacher_layers)
    num_layers = len(blocks) - 1
    if not student.init_layers:
        return blocks[:-1]
    layers = student.init_layers
    ascending = all(low < high for low, high in zip(layers, layers[1:], strict=False))
    if len(layers) != num_layers or not ascending or layers[0] < 0 or layers[-1] >= num_teacher_layers:
        raise UserError(
            f"student.init_layers: found {layers}; give {num_layers} (student.num_hidden_layers) different layers in "
            f"ascending order, each of 0 .. {num_teacher_layers - 1}"
        )
    return tuple(layers)


def _blocks(student: StudentConfig, num_teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layers cut into M blocks as equal as can be: where each begins, and the end of the last, N.

    m x N / M for m = 0 .. M, rounded half up, in whole numbers: 24 layers of 36 begin at 0, 2, 3, 5, 6, ...

    Raises:
        UserError: M is not in 1 .. N.
    """
    num_layers = num_student_layers(student, num_teacher_layers)
    if not 1 <= num_layers <= num_teacher_layers:
        raise UserError(
            f"student.num_hidden_layers: found {num_layers}, the teacher has {num_teacher_layers}; allowed are 1 .. "
            f"{num_teacher_layers} (each student layer stands for one or more of the teacher's); set a number of these"
        )
    return tuple((2 * m * num_teacher_layers + num_layers) // (2 * num_layers) for m in range(num_layers + 1))


def _check_leaving(student: StudentConfig, pruning: PruningConfig, num_teacher_layers: int) -> None:
    """Raise `UserError` where layers are to leave in events, because the config says so, and cannot."""
    if not _chooses_in_events(student, pruning):
        return
    field, value = "student.layer_choice", student.layer_choice
    if value != "influence":
        field, value = "pruning.depth_schedule", pruning.depth_schedule
    default = "uniform" if value == "influence" else "one_shot"
    if student.init != "teacher":
        raise UserError(
            f"{field}: found {value}, but a student of student.init=random has its final layers from the start; set "
            f"{field}={default}, or student.init=teacher"
        )
    if num_student_layers(student, num_teacher_layers) == num_teacher_layers:
        raise UserError(
            f"{field}: found {value}, but the student keeps all {num_teacher_layers} layers of the teacher; set "
            f"student.num_hidden_layers below {num_teacher_layers}, or {field}={default}"
        )
    if student.layer_choice == "influence" and student.init_layers:
        raise UserError(
            f"student.init_layers: found {student.init_layers} beside student.layer_choice=influence, which chooses "
            f"layers itself; leave it empty, or set student.layer_choice=uniform"
        )
    if student.init_layers and student.init_layers[0] != 0:
        raise UserError(
            f"student.init_layers: found {student.init_layers} with pruning.depth_schedule=linear, which keeps the "
            f"first layer; let it begin with 0, or set pruning.depth_schedule=one_shot"
        )
    if pruning.depth_schedule == "linear" and pruning.schedule == "gap":
        raise UserError(
            "pruning.depth_schedule: found linear with pruning.schedule=gap, which has to know every rise of the KL; "
            "set pruning.depth_schedule=one_shot, or pruning.schedule=cubic, linear, one_shot or none"
        )


def check_student(student: StudentConfig, pruning: PruningConfig, loss: LossConfig, num_teacher_layers: int) -> None:
    """Raises `UserError` when the student cannot start as the config says."""
    compared_layers(student, num_teacher_layers)
    copied_layers(student, num_teacher_layers)
    _check_leaving(student, pruning, num_teacher_layers)
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
