"""Tokens of a block of a run whose user has set none: as many as the teacher has positions for, within limits."""

from __future__ import annotations

from transformers import PretrainedConfig

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.models import family_of

MOST_TOKENS = 512
"""Of blocks of running text. A student that has seen blocks of 64 is twice as far from its teacher at the positions
behind them (LOG.md, 2026-12-01)."""
SHORT_STEPS = 0.5
"""data.short_steps beside it: without them the student is as far at short texts (the same table)."""
MOST_OF_ONE_TEXT = 128
"""Of tasks whose block holds one text, padded: as in transformers' scripts for classifiers."""


def give_length(config: RunConfig, teacher_config: PretrainedConfig) -> None:
    """Set `data.seq_len` and `data.short_steps`, in place, unless the user has; `data.task` is settled."""
    data, task = config.data, task_of(config.data)
    if config.is_set("data.seq_len"):
        return
    positions = family_of(teacher_config.model_type).shape(teacher_config).max_tokens
    data.seq_len = min(positions, MOST_OF_ONE_TEXT if task.has_single_texts else MOST_TOKENS)
    if not config.is_set("data.short_steps") and not task.has_single_texts and data.task != "causal":
        data.short_steps = SHORT_STEPS
