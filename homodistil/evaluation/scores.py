"""How near the logits of a student's labels are to those of its teacher, on held-out texts or pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from homodistil.data.batch import Batch
from homodistil.distill.losses.scores import label_divergence
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.vectors import moved, of_all_ranks
from homodistil.models.classifier import LogitKind, logit_kind


@torch.no_grad()
def evaluate_scores(
    student: Student,
    teacher: Teacher,
    batches: Iterable[Batch],
    positions: np.ndarray,
    num_texts: int,
    also: Callable[[Tensor], dict[str, float]] = lambda logits: {},
) -> dict[str, float]:
    """Measures over the texts of all ranks (`compared_scores`), and their number (evaluated_texts). Every rank calls
    it. Arguments as of `evaluate_vectors`, and `also`: further measures of the student's logits (num_texts, L)."""
    pairs = [(student.scores(here), teacher.scores(here)) for here in moved(batches, teacher)]
    ours, theirs = (
        of_all_ranks(torch.cat(logits)[: len(positions)], positions, num_texts) for logits in zip(*pairs, strict=True)
    )
    measured = compared_scores(ours, theirs, logit_kind(teacher.model.config)) | also(ours)
    return measured | {"evaluated_texts": float(num_texts)}


@torch.no_grad()
def teacher_logits(teacher: Teacher, batches: Iterable[Batch], positions: np.ndarray, num_texts: int) -> Tensor:
    """(num_texts, L), the same on every rank. Every rank calls it. Arguments as of `evaluate_vectors`."""
    logits = torch.cat([teacher.scores(here) for here in moved(batches, teacher)])
    return of_all_ranks(logits[: len(positions)], positions, num_texts)


def compared_scores(ours: Tensor, theirs: Tensor, kind: LogitKind) -> dict[str, float]:
    """kl_to_teacher (nats) and label_agreement (share of texts with the same most probable label); where logits are
    values score_mse, score_pearson and score_spearman, the last two where there are two different ones at least.

    Args:
        ours, theirs: logits of N texts, (N, L).
    """
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    if kind == "categories":
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
        return {"kl_to_teacher": label_divergence(ours, theirs).item(), "label_agreement": agreement.item()}
    known = {f"score_{name}": value for name, value in correlations(ours, theirs).items()}
    return {"score_mse": (ours - theirs).square().mean().item()} | known


def correlations(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """pearson and spearman, means over labels, where there are two different scores at least of each label.

    Args:
        ours, theirs: float64 (N, L), on the CPU.
    """
    from scipy.stats import pearsonr, spearmanr  # half a second of every rank's start otherwise

    measures = {"pearson": pearsonr, "spearman": spearmanr}
    values = {name: _correlation(measure, ours, theirs) for name, measure in measures.items()}
    return {name: value for name, value in values.items() if value is not None}


def scores_of_itself(kind: LogitKind) -> dict[str, float]:
    """`compared_scores` of a model with itself."""
    if kind == "categories":
        return {"kl_to_teacher": 0.0, "label_agreement": 1.0}
    return {"score_mse": 0.0, "score_pearson": 1.0, "score_spearman": 1.0}


def _correlation(measure: Callable, ours: Tensor, theirs: Tensor) -> float | None:
    """Mean over labels; None where one has the same score for all texts on either side."""
    columns = list(zip(ours.T.numpy(), theirs.T.numpy(), strict=True))
    if any(len(np.unique(side)) < 2 for column in columns for side in column):
        return None
    return float(np.mean([measure(*column).statistic for column in columns]))
