"""Tokens of a block of a run whose user has set none: as many as the teacher has positions for, within limits."""

from __future__ import annotations

from transformers import PretrainedConfig

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.models import family_of

MOST_TOKENS = 512
"""Of blocks of running text. A student that has seen blocks of 64 is twice as far from its teacher at the positions
behind them (LOG.md, 2026-12-01)."""
MOST_OF_ONE_TEXT = 128
"""Of tasks whose block holds one text, padded: as in transformers' scripts for classifiers."""


def give_length(config: RunConfig, teacher_config: PretrainedConfig) -> None:
    """Set `data.seq_len`, in place, unless the user has; `data.task` is settled."""
    if "data.seq_len" in config.given:
        return
    positions = family_of(teacher_config.model_type).shape(teacher_config).max_tokens
    config.data.seq_len = min(positions, MOST_OF_ONE_TEXT if task_of(config.data).has_single_texts else MOST_TOKENS)
