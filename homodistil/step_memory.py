"""Bytes that a rank holds during a training step, from shapes alone: what does not depend on the batch, and what each
sequence adds. micro_batch.py compares the sums at two widths.

Counted at the moment where the backward pass begins, when everything saved for it is alive. Not counted, because it
is short-lived: what one operation needs while it runs, and buckets and gathered parameters on their way between ranks.
tests/test_step_memory.py holds the counts against what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from homodistil.config import LossConfig
from homodistil.flops import num_layers
from homodistil.models.axes import Widths

FP32_BYTES = 4
INT64_BYTES = 8
_LAYER_NORM_BYTES = 2 * FP32_BYTES  # mean and reciprocal deviation of a row


@dataclass(frozen=True)
class StateLayout:
    """How DeepSpeed spreads weights, gradients and AdamW's state over the ranks."""

    stage: int
    num_ranks: int
    dtype: torch.dtype
    """Of the model's weights."""
    accumulation_dtype: torch.dtype
    """Of the gradients while they are accumulated."""
    offloads_optimizer: bool
    """Masters and moments live in the host's memory, which a micro-batch does not compete for."""


def state_bytes(num_trainable: int, num_frozen: int, layout: StateLayout) -> float:
    """Weights, gradients, fp32 masters and the two moments of AdamW on one rank, paddings left out.

    ZeRO (Rajbhandari et al. 2020, section 5): stage 1 shares out masters and moments, 2 also gradients, 3 also weights.
    """
    share = {stage: 1 / layout.num_ranks if layout.stage >= stage else 1.0 for stage in (1, 2, 3)}
    weights = layout.dtype.itemsize * (num_trainable + num_frozen) * share[3]
    gradients = layout.accumulation_dtype.itemsize * num_trainable * share[2]
    # Stage 0 in fp32 updates the weights themselves; ZeRO keeps masters apart from them even in fp32.
    tensors = 2 if layout.stage == 0 and layout.dtype == torch.float32 else 3
    optimizer = 0 if layout.offloads_optimizer else tensors * FP32_BYTES * num_trainable * share[1]
    return weights + gradients + optimizer


@dataclass(frozen=True)
class SequenceBytes:
    """What one sequence of a micro-batch adds."""

    student: float
    """Saved by the student's forward pass for its backward pass."""
    losses: float
    """Saved by the terms of the objective."""
    teacher: float
    """The teacher's output: it builds no graph, so nothing else of it stays."""

    @property
    def total(self) -> float:
        return self.student + self.losses + self.teacher


def sequence_bytes(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    seq_len: int,
    masked_rows: float,
    vocab_size: int,
    student_bytes: int,
    teacher_bytes: int,
) -> SequenceBytes:
    """Activations of one sequence at the student's widths of today.

    Dropout masks are left out: off by default, and a small share of what they are made for.

    Args:
        student, teacher: axis -> width (`models.axes`), the same number of layers in both.
        loss: a term of weight 0 saves nothing; without any distillation term the teacher does not run.
        seq_len: tokens of a sequence, padding included.
        masked_rows: rows to predict in a sequence (an expected value).
        vocab_size: rows of the decoder.
        student_bytes, teacher_bytes: bytes of an element of each model's activations.
    """
    kl_rows = seq_len if loss.kl_positions == "all" else masked_rows
    head_rows = max(masked_rows if loss.mlm else 0, kl_rows if loss.kl else 0)
    distils = any((loss.kl, loss.hidden, loss.attention, loss.embedding))
    ours = _backbone(student, seq_len, student_bytes) + _mlm_head(student["hidden"], head_rows, student_bytes)
    terms = _logit_terms(loss, masked_rows, kl_rows, vocab_size) + _score_terms(student, loss, seq_len, student_bytes)
    terms += _hidden_terms(student, teacher, loss, seq_len, student_bytes)
    theirs = _taps(teacher, seq_len) + (kl_rows * vocab_size if loss.kl else 0)
    return SequenceBytes(ours, terms, teacher_bytes * theirs if distils else 0)


def _backbone(widths: Widths, seq_len: int, element_bytes: int) -> float:
    """Embeddings (ids, the sum before LayerNorm) and the layers."""
    layers = sum(_layer(widths, i, seq_len, element_bytes) for i in range(num_layers(widths)))
    return layers + seq_len * (2 * INT64_BYTES + _LAYER_NORM_BYTES + widths["hidden"] * element_bytes)


def _layer(widths: Widths, i: int, seq_len: int, element_bytes: int) -> float:
    hidden, ffn, heads = widths["hidden"], widths[f"layer.{i}.ffn"], widths[f"layer.{i}.heads"]
    qk, vo = heads * widths[f"layer.{i}.qk_dim"], heads * widths[f"layer.{i}.vo_dim"]
    # The layer's input, both sums before a LayerNorm, what lies between the blocks; query and key, value and
    # attention output; the neurons before and after GELU.
    elements = 4 * hidden + 2 * qk + 2 * vo + 2 * ffn
    log_sum_exp = heads * FP32_BYTES  # of the fused attention, which saves no scores
    return seq_len * (elements * element_bytes + 2 * _LAYER_NORM_BYTES + log_sum_exp)


def _mlm_head(hidden: int, rows: float, element_bytes: int) -> float:
    """Input, before and after GELU, after LayerNorm."""
    return rows * (4 * hidden * element_bytes + _LAYER_NORM_BYTES) if rows else 0


def _logit_terms(loss: LossConfig, masked_rows: float, kl_rows: float, vocab_size: int) -> float:
    """fp32: log-softmax of the cross-entropy; log q and p of the KL; the gradient with which the way back begins."""
    saved = (masked_rows if loss.mlm else 0) + (2 * kl_rows if loss.kl else 0)
    gradient = max(masked_rows if loss.mlm else 0, kl_rows if loss.kl else 0)
    return FP32_BYTES * vocab_size * (saved + gradient)


def _hidden_terms(student: Widths, teacher: Widths, loss: LossConfig, seq_len: int, element_bytes: int) -> float:
    """The fp32 difference of each comparison, and the last layer's output, which nothing else would save.

    What else a projection reads is held anyway: the next layer's input, or the teacher's output.
    """
    count = (1 if loss.embedding else 0) + (num_layers(student) if loss.hidden else 0)
    width = (teacher if loss.projection == "student" else student)["hidden"]
    reads_last = loss.hidden and loss.projection == "student" and loss.projection_learned
    return seq_len * (count * width * FP32_BYTES + (student["hidden"] * element_bytes if reads_last else 0))


def _score_terms(student: Widths, loss: LossConfig, seq_len: int, element_bytes: int) -> float:
    """Per layer: contiguous copies of query and key, the fp32 difference of the scores, the mask of valid pairs."""
    if not loss.attention:
        return 0
    total = 0
    for i in range(num_layers(student)):
        heads = student[f"layer.{i}.heads"]
        matrices = 2 if loss.attention_target == "probabilities" else 1  # the student's softmax is saved as well
        scores = matrices * heads * seq_len**2 * FP32_BYTES + seq_len**2
        total += scores + 2 * seq_len * heads * student[f"layer.{i}.qk_dim"] * element_bytes
    return total


def _taps(widths: Widths, seq_len: int) -> float:
    """Elements of the embedding output, of every layer's output, and of its queries and keys."""
    layers = range(num_layers(widths))
    queries_and_keys = sum(2 * widths[f"layer.{i}.heads"] * widths[f"layer.{i}.qk_dim"] for i in layers)
    return seq_len * ((1 + len(layers)) * widths["hidden"] + queries_and_keys)
