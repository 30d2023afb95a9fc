"""Refuses ground-truth labels that cannot be meant as they are, before anything is trained on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.distill.build_teacher import build_teacher
from homodistil.distill.teacher import load_config
from homodistil.errors import UserError
from homodistil.evaluation.labels import BetterOrder, better_order, halved_counts
from homodistil.evaluation.scores import teacher_logits
from homodistil.evaluation.token_scores import teacher_label_counts
from homodistil.metrics.progress import doing
from homodistil.models.classifier import problem_type
from homodistil.training.inputs import RunInputs, teacher_copy

_MOST_SHOWN = 8


def check_ground_truth(config: RunConfig, run_inputs: RunInputs, dtype: torch.dtype) -> None:
    """Refuse a column without any label, and labels that fit the teacher clearly better in another order.

    Numbers of another data set may be in another order than the teacher's, and a student would then learn both. A run
    that has begun is not judged again. Every rank calls it, while none holds anything on its device.

    Args:
        dtype: of the teacher.

    Raises:
        UserError: on every rank.
    """
    if run_inputs.corpus.labels is None or run_inputs.begun_with is not None:
        return
    _check_there_are_some(config.data.label_column, run_inputs)
    teacher_config = load_config(run_inputs.teacher)
    if config.data.check_label_order and problem_type(teacher_config) == "single_label_classification":
        of_tokens = task_of(config.data).has_token_labels
        with doing("comparing the labels with the teacher's"):
            order = better_order(_teacher_counts(config, run_inputs, dtype, of_tokens), of_tokens)
        if order is not None:
            raise UserError(
                _other_order(
                    config.data.label_column, order, teacher_config.id2label, "tokens" if of_tokens else "texts"
                )
            )


def _check_there_are_some(column: str, run_inputs: RunInputs) -> None:
    labels = run_inputs.corpus.labels.train
    if np.isnan(labels[np.arange(len(labels))]).all():
        raise UserError(
            f"data.label_column: {column!r} holds no label for any of the {len(labels)} training texts (null or -100 "
            f"alone); name the column of the labels, or leave data.label_column out"
        )


def _teacher_counts(config: RunConfig, run_inputs: RunInputs, dtype: torch.dtype, of_tokens: bool) -> Tensor:
    """What the teacher says of the held-out texts (or tokens) of each label (`halved_counts`)."""
    teacher = build_teacher(teacher_copy(run_inputs, dtype), config.teacher, run_inputs.device, dtype)
    if of_tokens:
        return teacher_label_counts(teacher, run_inputs.heldout(config))
    logits = teacher_logits(teacher, run_inputs.heldout(config), *run_inputs.heldout_positions(config)).cpu()
    return halved_counts(logits, run_inputs.heldout_labels())


def _other_order(column: str, better: BetterOrder, names: dict[int, str], rows: str) -> str:
    moved = [(number, names[label]) for number, label in enumerate(better.order) if number != label]
    shown = ", ".join(f"{number}={name}" for number, name in moved[:_MOST_SHOWN]) + ", ..." * (len(moved) > _MOST_SHOWN)
    return (
        f"data.label_column: the teacher gives {better.accuracy_as_given:.1%} of {better.num_texts} held-out {rows} "
        f"the label in {column!r}, but {better.accuracy:.1%} if its numbers meant {shown}, which seems to be their "
        f"order; write the teacher's names into the column, or set data.check_label_order=false to train on them as "
        f"they are"
    )
