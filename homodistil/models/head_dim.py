"""student.head_dim: narrower heads of a teacher whose head size does not follow from its hidden size."""

from __future__ import annotations

from transformers import PretrainedConfig

from homodistil.errors import UserError
from homodistil.models.axes import Widths, kind_of, layer_widths
from homodistil.models.family import ModelFamily

_KINDS = ("qk_dim", "vo_dim", "head_norm")


def check_head_dim(head_dim: int | None, family: ModelFamily, config: PretrainedConfig, teacher: Widths) -> None:
    """Raise `UserError` where heads of `teacher` cannot be cut to `head_dim` dims.

    Args:
        config: of the teacher.
    """
    if head_dim is None:
        return
    if (obstacle := family.head_dim_obstacle(config)) is not None:
        raise UserError(f"student.head_dim: found {head_dim}, but {obstacle}; leave it out")
    limit = layer_widths(teacher, 0).qk_dim
    if not 2 <= head_dim <= limit or head_dim % 2:
        raise UserError(
            f"student.head_dim: found {head_dim}, allowed are even numbers from 2 to the teacher's {limit} (rotary "
            f"positions turn dims in pairs); set one of them, or leave it out"
        )


def with_head_dim(widths: Widths, head_dim: int | None) -> dict[str, int]:
    """`widths` with heads of `head_dim` dims; None: as they are."""
    if head_dim is None:
        return dict(widths)
    return {axis: head_dim if kind_of(axis) in _KINDS else width for axis, width in widths.items()}
