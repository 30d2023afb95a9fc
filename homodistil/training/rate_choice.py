"""Learning rates that the user has not set: by the width that the student ends with, and what it learns; of the
teacher's correction by the teacher's width."""

from __future__ import annotations

from homodistil.config.schema import RunConfig

RATE_TIMES_WIDTH = 0.192
"""Learning rate times hidden size, of masked language models and sentence embedders: 3e-3 at 64, 1e-3 at 192, 5e-4 at
384. The best rates that we have measured, of students between 16 and 384 wide, are within a factor of two of it
(LOG.md, 2026-12-01)."""
LOWER_SHARE = 0.25
"""Share of it that decoders and heads of labels get, whose best rates are lower (the same table)."""


def rate_of_width(hidden_size: int, is_lower: bool) -> float:
    """Peak learning rate of a student that ends with this hidden size, to two digits.

    Args:
        is_lower: whether it is a decoder, or learns the logits of labels.
    """
    share = LOWER_SHARE if is_lower else 1.0
    return float(f"{share * RATE_TIMES_WIDTH / hidden_size:.2g}")


def give_correction_rate(config: RunConfig, hidden_size: int, is_causal: bool) -> None:
    """Set `teacher.correction_lr`, in place, where there is a correction, unless the user has.

    Args:
        hidden_size, is_causal: of the teacher.
    """
    if config.teacher.correction_steps and not config.is_set("teacher.correction_lr"):
        config.teacher.correction_lr = rate_of_width(hidden_size, is_causal)
