"""Whether a run of task `scores` or `token_scores` is meant, and the term that suits its teacher's labels."""

from __future__ import annotations

from homodistil.config.schema import TASKS_OF_LABELS, RunConfig, value_of
from homodistil.config.schema_loss import SCORE_WEIGHTS
from homodistil.data.task import TASKS
from homodistil.distill.classifier_files import check_labels, task_of_labels
from homodistil.errors import UserError
from homodistil.models.classifier import logit_kind
from homodistil.training.task_defaults import give_defaults, wants_head


def labels_task(config: RunConfig, teacher_config) -> str | None:
    """The task of a run that learns the logits of a classifier or cross-encoder; None: it learns none.

    Raises:
        UserError: it is asked to, and the teacher has no such head or one that cannot be read; pairs of texts for a
            token classifier.
    """
    is_left_open = config.data.task == "auto" and not wants_head(config)
    if config.data.task not in TASKS_OF_LABELS and not (is_left_open and task_of_labels(teacher_config)):
        _check_label_column(config, None)
        return None
    check_labels(teacher_config, config.teacher.name, config.data.task)
    task, pairs = task_of_labels(teacher_config), config.data.pair_columns
    if TASKS[task].has_token_labels and pairs:
        raise UserError(
            f"data.pair_columns: found {pairs}, but {config.teacher.name} is a token classifier (data.task={task}), "
            f"whose labels are those of the tokens of single texts; leave it out, and name the column of the texts in "
            f"data.text_column"
        )
    _check_label_column(config, task)
    return task


def _check_label_column(config: RunConfig, task: str | None) -> None:
    """Ground-truth labels are those of a classifier, for whole lines. `task`: as of `labels_task`."""
    column, teacher = config.data.label_column, config.teacher.name
    if column and task is None:
        raise UserError(
            f"data.label_column: found {column!r}, but {teacher} is not used as a classifier; leave data.label_column "
            f"out, or give a sequence classifier, token classifier or cross-encoder"
        )
    if column and "data.texts" in config.given and config.data.texts != "document" and not config.data.pair_columns:
        raise UserError(
            f"data.texts: found {config.data.texts}, allowed with data.label_column is document, as a label is that of "
            f"a whole line; leave data.texts out, or write one {config.data.texts} a line"
        )


def learn_labels(config: RunConfig, teacher_config) -> None:
    """The terms that suit the teacher's labels and the user's own, unless the user has chosen."""
    is_one_of_several = logit_kind(teacher_config) == "categories"
    unsuitable = ["loss.scores_mse" if is_one_of_several else "loss.scores_kl"]
    if not config.data.label_column:
        unsuitable.append("loss.labels")
    give_defaults(config, SCORE_WEIGHTS, leave_out=unsuitable)
    if config.loss.scores_kl > 0 and not is_one_of_several:
        raise UserError(
            f"loss.scores_kl: found {config.loss.scores_kl:g}, but the {teacher_config.num_labels} label(s) of "
            f"{config.teacher.name} are scores of their own (problem_type {teacher_config.problem_type}), without "
            f"probabilities to compare; set loss.scores_kl=0 and loss.scores_mse=1"
        )
    if not any(value_of(config, f"loss.{name}") > 0 for name in (*SCORE_WEIGHTS, "labels")):
        raise UserError(
            "loss.scores_kl: found 0, and loss.scores_mse is 0 as well, so that nothing trains the head of labels; "
            "give one of them a weight > 0, or set data.task=none to leave the head out"
        )
