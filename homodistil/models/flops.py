"""Model FLOPs of one optimizer step from shapes alone. With the peak of the device (metrics/device_peak.py): the MFU.

A multiply-add is 2 FLOPs. Counted: every matrix product the mathematics asks for. Not counted: embedding look-ups,
LayerNorm, softmax, GELU, the optimizer, and anything a kernel recomputes to save memory. Attention products are
counted over the full (seq_len, seq_len) square, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

from homodistil.config.schema import LossConfig
from homodistil.models.axes import Widths, num_layers


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over the whole global batch (all ranks together)."""

    teacher: float
    """Forward of the frozen teacher."""
    student: float
    """Forward and backward of the student."""
    losses: float
    """Distillation projections, and the scores that the attention and relation terms recompute, with their backward."""

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.losses


def step_flops(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    num_sequences: int,
    seq_len: int,
    target_rows: float,
    vocab_size: int,
) -> StepFlops:
    """FLOPs of one optimizer step at the student's widths of today.

    Args:
        student, teacher: axis -> width (`models.axes`); the student may have fewer layers.
        loss: a term of weight 0 costs nothing; without any distillation term the teacher does not run.
        num_sequences: global batch size in sequences.
        seq_len: tokens of a sequence, padding included.
        masked_rows: rows on which the MLM head runs, over the whole global batch (`kl_positions: all`: every token).
        vocab_size: rows of the decoder.
    """
    tokens = num_sequences * seq_len
    kl_rows = tokens if loss.kl_positions == "all" else target_rows
    student_rows = max(target_rows if loss.mlm else 0, kl_rows if loss.kl else 0)
    forward = _backbone(student, tokens, seq_len) + _mlm_head(student["hidden"], student_rows, vocab_size)
    distils = any((loss.kl, loss.hidden, loss.attention, loss.embedding, loss.cosine, loss.relations))
    teacher_head = _mlm_head(teacher["hidden"], kl_rows if loss.kl else 0, vocab_size)
    return StepFlops(
        teacher=_backbone(teacher, tokens, seq_len) + teacher_head if distils else 0,
        student=3 * forward,  # backward: one product for the gradient of each of the two factors
        losses=_projections(student, teacher, loss, tokens)
        + _score_terms(student, teacher, loss, tokens, seq_len)
        + _relation_terms(student, teacher, loss, tokens, seq_len),
    )


def _backbone(widths: Widths, tokens: float, seq_len: int) -> float:
    return sum(_layer(widths, i, tokens, seq_len) for i in range(num_layers(widths)))


def _layer(widths: Widths, i: int, tokens: float, seq_len: int) -> float:
    hidden, ffn, heads = widths["hidden"], widths[f"layer.{i}.ffn"], widths[f"layer.{i}.heads"]
    qk, vo = heads * widths[f"layer.{i}.qk_dim"], heads * widths[f"layer.{i}.vo_dim"]
    weights = hidden * (2 * qk + 2 * vo + 2 * ffn)  # query, key; value, output; the two of the feed-forward block
    products = seq_len * (qk + vo)  # scores; weighted sum
    return 2 * tokens * (weights + products)


def _mlm_head(hidden: int, rows: float, vocab_size: int) -> float:
    return 2 * rows * hidden * (hidden + vocab_size)  # transform, decoder


def _projections(student: Widths, teacher: Widths, loss: LossConfig, tokens: float) -> float:
    """H_s W or H_t W once for the embedding and once a layer, forward and backward."""
    count = (1 if loss.embedding else 0) + (num_layers(student) if loss.hidden else 0)
    forward = 2 * tokens * student["hidden"] * teacher["hidden"]
    # The teacher's states need no gradient; a frozen W needs none either.
    passes = 1 + (loss.projection == "student") + loss.projection_learned
    # The cosine's W is always the student's; of equal widths it may not even be there.
    of_cosine = 2 + loss.projection_learned if loss.cosine and student["hidden"] != teacher["hidden"] else 0
    return (count * passes + of_cosine) * forward


def _score_terms(student: Widths, teacher: Widths, loss: LossConfig, tokens: float, seq_len: int) -> float:
    """q.k of the student (forward and backward) and of the teacher's heads that the student still has."""
    if not loss.attention:
        return 0
    total = 0
    for i in range(num_layers(student)):
        heads = student[f"layer.{i}.heads"]
        per_head = 3 * student[f"layer.{i}.qk_dim"] + teacher[f"layer.{i}.qk_dim"]
        total += 2 * tokens * seq_len * heads * per_head
    return total


def _relation_terms(student: Widths, teacher: Widths, loss: LossConfig, tokens: float, seq_len: int) -> float:
    """A A^T of queries, keys and values of one layer: of the student (forward and backward) and of the teacher."""
    if not loss.relations:
        return 0
    ours, theirs = (dims_of_last_layer(widths) for widths in (student, teacher))
    return 2 * tokens * seq_len * (3 * ours + theirs)


def dims_of_last_layer(widths: Widths) -> int:
    """Of all heads, queries, keys and values together."""
    layer = f"layer.{num_layers(widths) - 1}"
    return widths[f"{layer}.heads"] * (2 * widths[f"{layer}.qk_dim"] + widths[f"{layer}.vo_dim"])
