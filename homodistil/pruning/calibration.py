"""Importance before the first step, for one-shot pruning: gradients of a few batches, no update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.models.axes import AxisTable
from homodistil.models.backbone import run_backbone
from homodistil.models.classifier import LogitKind
from homodistil.models.sentence_head import PoolingMode
from homodistil.pruning.compensation.label_draws import NUMBERS, label_direction
from homodistil.pruning.compensation.vectors import pooled_states
from homodistil.pruning.importance import Importance


class WholePiece(NamedTuple):
    """A whole parameter as a piece (see importance.Piece)."""

    name: str
    start: int
    weight: Tensor
    gradient: Tensor


def calibrate(
    importance: Importance,
    module: nn.Module,
    table: AxisTable,
    steps: Iterator[list[Batch]],
    loss: Callable[[Batch], Tensor],
) -> None:
    """Feed `importance` one update per element of `steps`, from a plain module that no engine holds yet.

    Args:
        module: the student; its gradients are left cleared.
        steps: micro-batches of this rank, a list per global batch.
        loss: micro-batch -> total loss with a graph.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for batches in steps:
        module.zero_grad(set_to_none=True)
        for batch in batches:
            (loss(batch) / len(batches)).backward()
        importance.accumulate(_pieces(module), table, shapes)
    module.zero_grad(set_to_none=True)


def _pieces(module: nn.Module) -> Iterator[WholePiece]:
    """Gradients averaged over ranks; each parameter is one rank's to report."""
    trained = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    for i, (name, parameter) in enumerate(trained):
        gradient = ranks.mean(parameter.grad.float())
        if i % ranks.world_size() == ranks.rank():
            yield WholePiece(name, 0, parameter.detach().float().flatten(), gradient.flatten())


def drawn_label_loss(student: Student, teacher: Teacher, seed: int) -> Callable[[Batch], Tensor]:
    """`pruning.importance=teacher_kl`: micro-batch -> mean cross-entropy (nats) to labels that the teacher draws.

    With labels from the teacher's own distribution the squared gradient is, in expectation, the diagonal of the Fisher
    information: the curvature of KL(teacher || student) where both agree. The gradient of the KL itself vanishes there.
    The loss is that of the student at the masked rows, and has a graph.

    Args:
        seed: of the labels; another one on every rank.
    """
    device = next(student.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def loss(batch: Batch) -> Tensor:
        shares = teacher.predict(batch).float().softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=generator).squeeze(1)
        logits = student(batch, only_logits=True).float()
        return functional.cross_entropy(logits, drawn, reduction="sum") / batch.counts.target_rows

    return loss


def drawn_direction_loss(student: Student, seed: int) -> Callable[[Batch], Tensor]:
    """For a copy of a teacher without a head: micro-batch -> mean over tokens of last hidden state times a direction.

    All distances of a copy are 0, and so are their gradients. With standard normal directions the squared gradient is,
    in expectation, the diagonal of J'J: the curvature of half the squared distance of the hidden states. The loss has a
    graph.

    Args:
        student: plain.
        seed: of the directions; another one on every rank.
    """
    draw = _normal_directions(student, seed)

    def loss(batch: Batch) -> Tensor:
        last = run_backbone(student.model, student.family, batch.input_ids, batch.padding_mask, batch.token_types)
        products = (last.float() * draw(last.shape)).sum(-1) * batch.attention_mask
        return products.sum() / batch.counts.tokens

    return loss


def drawn_vector_loss(student: Student, pooling: PoolingMode, seed: int) -> Callable[[Batch], Tensor]:
    """For a copy of a sentence embedder: micro-batch -> mean over texts of normalised vector times a direction.

    As `drawn_direction_loss`, of the curvature of 1 - cosine. The loss has a graph.

    Args:
        student: plain.
        seed: of the directions; another one on every rank.
    """
    draw = _normal_directions(student, seed)

    def loss(batch: Batch) -> Tensor:
        vectors = functional.normalize(pooled_states(student.model, student.family, batch, pooling), dim=-1)
        return (vectors * draw(vectors.shape)).sum() / len(vectors)

    return loss


def drawn_logit_loss(student: Student, kind: LogitKind, seed: int) -> Callable[[Batch], Tensor]:
    """For a copy of a classifier: micro-batch -> mean over texts, or tokens with labels, of logits times a direction.

    As `drawn_direction_loss`, of the curvature of the KL of the labels' probabilities (the direction is p - onehot of a
    label that the copy draws), or of half the squared distance of logits that are values. The loss has a graph.

    Args:
        student: plain.
        kind: what its logits are.
        seed: of the draws; another one on every rank.
    """
    device = next(student.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def loss(batch: Batch) -> Tensor:
        inputs = batch.input_ids, batch.padding_mask, batch.token_types
        last = run_backbone(student.model, student.family, *inputs)
        head = student.family.classifier(student.model)
        logits = head.logits(last, batch)
        if kind == "categories":
            numbers = torch.rand(len(logits), NUMBERS, generator=generator, device=device)
            direction = label_direction(logits.detach(), numbers)
        else:
            direction = torch.randn(logits.shape, generator=generator, device=device)
        return (logits * direction).sum() / (batch.counts.target_rows if head.pooling is None else len(logits))

    return loss


def _normal_directions(student: Student, seed: int) -> Callable[[torch.Size], Tensor]:
    """Shape -> the next standard normal draw of this seed, fp32 on the student's device."""
    device = next(student.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, device=device)
