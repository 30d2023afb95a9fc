"""`pruning.importance=teacher_kl`: the loss whose gradients it scores, cross-entropy to labels that the teacher draws.

With labels from the teacher's own distribution the squared gradient is, in expectation, the diagonal of the Fisher
information: the curvature of KL(teacher || student) where both agree. The gradient of the KL itself vanishes there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.data.masking import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher


def drawn_label_loss(student: Student, teacher: Teacher, seed: int) -> Callable[[Batch], Tensor]:
    """Micro-batch -> mean cross-entropy (nats) of the student at the masked rows, with a graph.

    Args:
        seed: of the labels; another one on every rank.
    """
    device = next(student.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def loss(batch: Batch) -> Tensor:
        shares = teacher.predict(batch).float().softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=generator).squeeze(1)
        logits = student(batch, only_logits=True).float()
        return functional.cross_entropy(logits, drawn, reduction="sum") / batch.counts.masked_rows

    return loss
