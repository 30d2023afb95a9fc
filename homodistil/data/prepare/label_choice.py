"""Which rule the labels of a run are read by, those of whole texts or of words."""

from __future__ import annotations

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.labels import READERS, LabelRule
from homodistil.data.prepare.token_labels import AnyLabelRule, TokenLabelRule
from homodistil.data.task import task_of
from homodistil.errors import UserError
from homodistil.models.classifier import problem_type


def label_rule(config: DataConfig, teacher_config) -> AnyLabelRule | None:
    """The rule of `config`, whose task is settled, for a teacher with this Hugging Face configuration; None: labels are
    not read.

    Raises:
        UserError: a problem_type that is none of Hugging Face's, or a token classifier whose labels are values.
    """
    if not config.label_column:
        return None
    kind, names, of_tokens = problem_type(teacher_config), teacher_config.id2label, task_of(config).has_token_labels
    if of_tokens and kind != "single_label_classification":
        raise UserError(
            f"data.label_column: found {config.label_column!r}, but the {len(names)} label(s) of the teacher, a token "
            f"classifier, are values (problem_type {kind}), and words are labelled with one of several; leave "
            f"data.label_column out"
        )
    if kind not in READERS:
        raise UserError(
            f"teacher.name: config.json has problem_type {kind!r}, allowed with data.label_column are "
            f"{', '.join(READERS)}; correct it there"
        )
    rule = LabelRule(config.label_column, kind, tuple(names[i] for i in range(len(names))))
    return TokenLabelRule(rule, config.seq_len) if of_tokens else rule
