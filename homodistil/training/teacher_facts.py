"""A teacher that a run can use, as far as it is known before the ranks join."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import RunConfig
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.training.resolve import ResolvedRun, resolve_run
from homodistil.training.teacher_checks import check_teacher
from homodistil.training.vocabulary_size import check_vocabulary, planned_config


class TeacherFacts(NamedTuple):
    """A valid teacher: its folder, tokenizer, and the run resolved for it."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    resolved: ResolvedRun


def teacher_facts(config: RunConfig, say: Callable[[str], None] = lambda line: None) -> TeacherFacts:
    """The teacher of `config` (downloaded if it is packaged), whose weights, tokenizer and target are checked.

    Args:
        say: as in `check_teacher`.

    Raises:
        UserError: as `check_teacher` and `load_tokenizer`.
    """
    folder = check_teacher(config, say)
    teacher_config = load_config(folder)
    tokenizer = load_tokenizer(folder, teacher_config, config.data.task)
    check_vocabulary(config.student, tokenizer)
    return TeacherFacts(folder, tokenizer, resolve_run(config, planned_config(config.student, teacher_config)))
