"""What losses and data want of a teacher and of the widths on the way to its student, without weights."""

from __future__ import annotations

from homodistil.distill.losses.active import check_terms
from homodistil.distill.losses.attention import check_target
from homodistil.distill.objective import Objective
from homodistil.errors import UserError
from homodistil.training.resolve import ResolvedRun


def check_shape(resolved: ResolvedRun) -> None:
    """Check them.

    Raises:
        UserError: attention maps that cannot be compared, heads that cannot be regrouped into relation heads, or too
            few positions.
    """
    config = resolved.config
    on_the_way = [resolved.table[step] for step in sorted(resolved.table)]
    check_target(config.loss, resolved.family.architecture)
    check_terms(config.loss, resolved.teacher_widths, [resolved.initial, *on_the_way])
    if any(resolved.depth.table) and not Objective(config.loss).needs_last_layer:
        raise UserError(
            f"pruning.depth_schedule: found {config.pruning.depth_schedule} with losses that read nothing of the last "
            f"layer's output, so that another last layer would have parts that nothing has trained; set one_shot, or "
            f"loss.hidden above 0"
        )
    if config.data.seq_len > (max_tokens := resolved.family.shape(resolved.teacher_config).max_tokens):
        raise UserError(
            f"data.seq_len: {config.data.seq_len} is above the {max_tokens} tokens that the teacher has positions for; "
            f"choose 3 .. {max_tokens}"
        )
