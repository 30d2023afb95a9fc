"""The term against ground-truth labels (data.label_column), beside those to the teacher, of which it asks nothing.

The kind is that of the teacher's class in transformers. R texts or, of a token classifier, tokens of a micro-batch, L
labels of the head, W numbers of a label (data/prepare/labels.py); a row without a label has NaN there, and counts for
the other terms alone.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from homodistil.distill.losses.scores import logit_rows
from homodistil.distill.losses.term import BatchSizes, Step, Term, Weighted
from homodistil.models.classifier import CLASSIFIER_AXIS, NO_LABEL, ProblemType, problem_type


class Labels(Term):
    """Cross-entropy, squared distance or binary cross-entropy, mean over the rows of the step that have a label."""

    names = ("labels",)
    needs = frozenset({"last"})

    @property
    def needs_teacher(self) -> bool:
        return False

    def at_end(self, last: Tensor, step: Step) -> Weighted:
        model = step.student.model
        logits = step.student.family.classifier(model).logits(last, step.batch)
        total = label_loss(logits, step.batch.labels, problem_type(model.config))
        return self.weighted({self.name: total / step.batch.counts.labelled})

    def flops(self, sizes: BatchSizes) -> float:
        """The first linear of the student's head; the last one's few outputs are left out."""
        return 2 * logit_rows(sizes) * 3 * sizes.student["hidden"] * sizes.student.get(CLASSIFIER_AXIS, 0)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """What the linears read, and what the first one puts out."""
        elements = sizes.student["hidden"] + 2 * sizes.student.get(CLASSIFIER_AXIS, 0)
        return logit_rows(sizes) * elements * sizes.student_bytes


def label_loss(logits: Tensor, labels: Tensor, kind: ProblemType) -> Tensor:
    """Sum over rows that have a label; a mean over the labels of each; fp32 0-dim, with a graph in any case.

    Args:
        logits: fp32 (R, L).
        labels: fp32 (R, W), NaN where there is none.
    """
    if kind == "single_label_classification":
        targets = labels[:, 0].nan_to_num(NO_LABEL).long()
        return functional.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="sum")
    is_there, targets = (~labels.isnan()).to(logits.dtype), labels.nan_to_num()
    if kind == "regression":
        return ((logits - targets).square() * is_there).sum() / logits.shape[1]
    summed = functional.binary_cross_entropy_with_logits(logits, targets, weight=is_there, reduction="sum")
    return summed / logits.shape[1]
