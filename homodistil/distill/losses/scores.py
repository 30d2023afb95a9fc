"""The terms on the logits of a head of labels, those of a sequence classifier or cross-encoder.

Both sides go through their own head (models/classifier.py), and the labels of both are the teacher's, in its order: no
matrix stands between them. B texts or pairs of a micro-batch, L labels.
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
        student, mask = step.student, step.batch.attention_mask
        ours = student.family.classifier(student.model).logits(last, mask)
        return self.weighted({self.name: self._value(ours, step.teacher.scores())})

    @abstractmethod
    def _value(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of fp32 logits (B, L); 0-dim."""

    def flops(self, sizes: BatchSizes) -> float:
        """The first linear of both heads, on one row a text; the second one's few outputs are left out."""
        student, teacher = (widths["hidden"] * widths[CLASSIFIER_AXIS] for widths in (sizes.student, sizes.teacher))
        return 2 * sizes.num_sequences * (3 * student + teacher)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """What both linears read, and what the first one puts out."""
        elements = sizes.student["hidden"] + 2 * sizes.student[CLASSIFIER_AXIS]
        return sizes.num_sequences * elements * sizes.student_bytes


class ScoresKL(_OfLogits):
    """KL(teacher || student) of the probabilities of labels, of which one holds."""

    names = ("scores_kl",)

    def _value(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return label_divergence(ours, theirs, self.loss.scores_temperature)


class ScoresMSE(_OfLogits):
    """Squared distance of logits that are scores, one for each label."""

    names = ("scores_mse",)

    def _value(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return functional.mse_loss(ours, theirs)


def label_divergence(ours: Tensor, theirs: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), nats, mean over texts, times the temperature's square (Hinton et al. 2015); 0-dim.

    Args:
        ours, theirs: logits (B, L).
        temperature: by which both are divided.
    """
    logs = [(logits / temperature).log_softmax(-1) for logits in (ours, theirs.detach())]
    return temperature**2 * functional.kl_div(*logs, reduction="batchmean", log_target=True)
