"""Whether a run of task `scores` is meant, and the term that suits its teacher's labels."""

from __future__ import annotations

from homodistil.config.schema import RunConfig, value_of
from homodistil.config.schema_loss import SCORE_WEIGHTS
from homodistil.distill.classifier_files import check_labels, is_sequence_classifier
from homodistil.errors import UserError
from homodistil.models.classifier import logit_kind
from homodistil.training.task_defaults import give_defaults, wants_head


def learns_labels(config: RunConfig, teacher_config) -> bool:
    """Whether a run learns the logits of a sequence classifier or cross-encoder.

    Raises:
        UserError: it is asked to, and the teacher has no such head or one that cannot be read.
    """
    is_left_open = config.data.task == "auto" and not wants_head(config)
    if config.data.task != "scores" and not (is_left_open and is_sequence_classifier(teacher_config)):
        return False
    check_labels(teacher_config, config.teacher.name)
    return True


def learn_labels(config: RunConfig, teacher_config) -> None:
    """The term that suits the teacher's labels, unless the user has chosen."""
    is_one_of_several = logit_kind(teacher_config) == "categories"
    give_defaults(config, SCORE_WEIGHTS, leave_out="loss.scores_mse" if is_one_of_several else "loss.scores_kl")
    if config.loss.scores_kl > 0 and not is_one_of_several:
        raise UserError(
            f"loss.scores_kl: found {config.loss.scores_kl:g}, but the {teacher_config.num_labels} label(s) of "
            f"{config.teacher.name} are scores of their own (problem_type {teacher_config.problem_type}), without "
            f"probabilities to compare; set loss.scores_kl=0 and loss.scores_mse=1"
        )
    if not any(value_of(config, f"loss.{name}") > 0 for name in SCORE_WEIGHTS):
        raise UserError(
            "loss.scores_kl: found 0, and loss.scores_mse is 0 as well, so that nothing trains the head of labels; "
            "give one of them a weight > 0, or set data.task=none to leave the head out"
        )
