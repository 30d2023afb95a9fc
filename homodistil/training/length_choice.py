"""Tokens of a block of a run whose user has set none: as many as the teacher has positions for, within limits."""

from __future__ import annotations

from transformers import PretrainedConfig

from homodistil.config.schema import RunConfig
from homodistil.data.short_steps import SHORTEST_BLOCK
from homodistil.data.task import task_of
from homodistil.errors import UserError
from homodistil.models import family_of

MOST_TOKENS = 512
"""Longest block of running text that is chosen. A student that has seen blocks of 64 is twice as far from its teacher
at the positions behind them (LOG.md, 2026-12-01)."""
SHORT_STEPS = 0.5
"""data.short_steps that goes with it: without short steps the student is as far from its teacher at short texts (the
same table)."""
MOST_OF_ONE_TEXT = 128
"""Longest block that is chosen where it holds one text, padded: as in transformers' scripts for classifiers."""


def give_length(config: RunConfig, teacher_config: PretrainedConfig) -> None:
    """Set `data.seq_len` and `data.short_steps`, in place, unless the user has; `data.task` is settled.

    Raises:
        UserError: short steps of a task or a length whose blocks cannot be split.
    """
    data, task = config.data, task_of(config.data)
    if not config.is_set("data.seq_len"):
        positions = family_of(teacher_config.model_type).shape(teacher_config).max_tokens
        data.seq_len = min(positions, MOST_OF_ONE_TEXT if task.has_single_texts else MOST_TOKENS)
        if not config.is_set("data.short_steps") and task.can_split_blocks and data.seq_len >= SHORTEST_BLOCK:
            data.short_steps = SHORT_STEPS
    if data.short_steps and not (task.can_split_blocks and data.seq_len >= SHORTEST_BLOCK):
        raise UserError(
            f"data.short_steps: found {data.short_steps:g}, allowed is 0 with data.task={task.name} and "
            f"data.seq_len={data.seq_len}; blocks of the tasks mlm and none are split, of {SHORTEST_BLOCK} tokens and "
            f"more; set data.short_steps=0"
        )
