"""How near the logits of a student's labels are to those of its teacher, at the tokens of held-out texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from homodistil.data.batch import Batch
from homodistil.distill.losses.scores import label_divergence
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.evaluation.labels import halved_counts
from homodistil.evaluation.token_labels import TokenLabels
from homodistil.evaluation.vectors import moved
from homodistil.models.classifier import LogitKind, logit_kind


@torch.no_grad()
def evaluate_token_scores(
    student: Student, teacher: Teacher, batches: Iterable[Batch], num_texts: int
) -> dict[str, float]:
    """Measures over the tokens of all ranks' texts, and the numbers of both (evaluated_texts, evaluated_tokens).

    Every rank calls it. There are too many tokens to bring them together, so that no ranks are compared.

    Args:
        batches: this rank's share (`fixed_batches`).
        num_texts: of all ranks.

    Returns:
        kl_to_teacher (nats) and token_agreement (share of tokens with the same most probable label); where logits are
        values score_mse; where tokens have labels `TokenLabels.measures` of the student's.
    """
    kind = logit_kind(teacher.model.config)
    sums = torch.zeros(3, dtype=torch.float64, device=teacher.device)
    labels = TokenLabels(teacher.model.config.id2label, teacher.device)
    for batch in moved(batches, teacher):
        ours = student.scores(batch)
        sums += token_sums(ours, teacher.scores(batch), kind)
        if batch.labels is not None:
            labels.add(ours, batch)
    distance, same, count = ranks.total(sums).tolist()
    sizes = {"evaluated_texts": float(num_texts), "evaluated_tokens": count} | labels.measures()
    if kind == "values":
        return {"score_mse": distance / max(count, 1)} | sizes
    return {"kl_to_teacher": distance / max(count, 1), "token_agreement": same / max(count, 1)} | sizes


@torch.no_grad()
def teacher_to_labels(teacher: Teacher, batches: Iterable[Batch]) -> dict[str, float]:
    """`TokenLabels.measures` of the teacher's logits, over the labelled tokens of all ranks' texts. Every rank calls
    it."""
    labels = TokenLabels(teacher.model.config.id2label, teacher.device)
    for batch in moved(batches, teacher):
        labels.add(teacher.scores(batch), batch)
    return labels.measures()


@torch.no_grad()
def teacher_label_counts(teacher: Teacher, batches: Iterable[Batch]) -> Tensor:
    """`halved_counts` of the teacher's logits at the labelled tokens of all ranks' texts, float64 (2, L, L), the same
    on every rank. Every rank calls it."""
    parts = [halved_counts(teacher.scores(batch), batch.labels) for batch in moved(batches, teacher)]
    return ranks.total(torch.stack(parts).sum(0))


def token_sums(ours: Tensor, theirs: Tensor, kind: LogitKind) -> Tensor:
    """Of logits (tokens, L), fp64 (3,): the sum of KLs (nats) or mean squared distances, the number of tokens with the
    same most probable label, and of all."""
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    ours, theirs = ours.double(), theirs.double()
    if kind == "categories":
        distance = label_divergence(ours, theirs, num_rows=1.0)
    else:
        distance = (ours - theirs).square().mean(-1).sum()
    return torch.stack([distance, same.double(), distance.new_tensor(len(ours))])


def token_scores_of_itself(kind: LogitKind) -> dict[str, float]:
    """`evaluate_token_scores` of a model with itself."""
    return {"score_mse": 0.0} if kind == "values" else {"kl_to_teacher": 0.0, "token_agreement": 1.0}
