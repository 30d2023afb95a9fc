"""The terms on the logits of a head of labels, those of a sequence classifier or cross-encoder, or a token classifier.

Both sides go through their own head (models/classifier.py), and the labels of both are the teacher's, in its order: no
matrix stands between them. R texts, pairs or tokens of a micro-batch, L labels.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.nn import functional

from homodistil.distill.losses.term import BatchSizes, Step, Term, Weighted
from homodistil.models.classifier import CLASSIFIER_AXIS


class _OfLogits(Term):
    """A distance between the logits of student and teacher."""

    needs = frozenset({"last"})
    takes_stored = True

    def at_end(self, last: Tensor, step: Step) -> Weighted | None:
        if step.teacher is None:
            return None
        head = step.student.family.classifier(step.student.model)
        # Micro-batches have as many texts each, but more or fewer tokens.
        num_rows = step.batch.counts.target_rows if head.pooling is None else None
        value = self._value(head.logits(last, step.batch), step.teacher.scores(), num_rows)
        return self.weighted({self.name: value})

    @abstractmethod
    def _value(self, ours: Tensor, theirs: Tensor, num_rows: float | Tensor | None) -> Tensor:
        """Mean over rows, of fp32 logits (R, L); 0-dim.

        Args:
            num_rows: what the sum is divided by; None: R.
        """

    def flops(self, sizes: BatchSizes) -> float:
        """The first linear of both heads, where there is one; the last one's few outputs are left out."""
        student, teacher = (w["hidden"] * w.get(CLASSIFIER_AXIS, 0) for w in (sizes.student, sizes.teacher))
        return 2 * logit_rows(sizes) * (3 * student + teacher)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """What the linears read, and what the first one puts out."""
        elements = sizes.student["hidden"] + 2 * sizes.student.get(CLASSIFIER_AXIS, 0)
        return logit_rows(sizes) * elements * sizes.student_bytes


def logit_rows(sizes: BatchSizes) -> float:
    """Rows of logits: texts, or the tokens that a token classifier labels (one of texts predicts nothing at tokens)."""
    return sizes.target_rows or sizes.num_sequences


class ScoresKL(_OfLogits):
    """KL(teacher || student) of the probabilities of labels, of which one holds."""

    names = ("scores_kl",)

    def _value(self, ours: Tensor, theirs: Tensor, num_rows: float | Tensor | None) -> Tensor:
        return label_divergence(ours, theirs, self.loss.scores_temperature, num_rows)


class ScoresMSE(_OfLogits):
    """Squared distance of logits that are scores, one for each label."""

    names = ("scores_mse",)

    def _value(self, ours: Tensor, theirs: Tensor, num_rows: float | Tensor | None) -> Tensor:
        if num_rows is None:
            return functional.mse_loss(ours, theirs)
        return functional.mse_loss(ours, theirs, reduction="sum") / (num_rows * ours.shape[1])


def label_divergence(
    ours: Tensor, theirs: Tensor, temperature: float = 1.0, num_rows: float | Tensor | None = None
) -> Tensor:
    """KL(teacher || student), nats, mean over rows, times the temperature's square (Hinton et al. 2015); 0-dim.

    Args:
        ours, theirs: logits (R, L).
        temperature: by which both are divided.
        num_rows: what the sum over rows is divided by; None: R.
    """
    logs = [(logits / temperature).log_softmax(-1) for logits in (ours, theirs.detach())]
    total = functional.kl_div(*logs, reduction="sum", log_target=True)
    return temperature**2 * (total / (len(ours) if num_rows is None else num_rows))
