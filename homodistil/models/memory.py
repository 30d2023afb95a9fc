"""Bytes that a rank holds during a training step, from shapes alone: what does not depend on the batch, and what each
sequence adds. training/micro_batch.py compares the sums at two widths.

Counted at the moment where the backward pass begins, when everything saved for it is alive. Not counted, because it
is short-lived: what one operation needs while it runs, and buckets and gathered parameters on their way between ranks.
tests/unit/models/test_step_memory.py holds the counts against what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from homodistil.config.schema import LossConfig
from homodistil.models.axes import Widths, num_layers
from homodistil.models.flops import dims_of_last_layer

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
    """What the teacher holds before the student begins: its output, or nothing in lock-step. Freed layer by layer."""

    @property
    def total(self) -> float:
        """The larger of both ends of the student's forward pass: layer by layer, what it saves replaces the other."""
        return max(self.student + self.losses, self.teacher)


def sequence_bytes(
    student: Widths,
    teacher: Widths,
    loss: LossConfig,
    *,
    seq_len: int,
    target_rows: float,
    vocab_size: int,
    student_bytes: int,
    teacher_bytes: int,
    lock_step: bool = True,
    keeps_probabilities: bool = False,
) -> SequenceBytes:
    """Activations of one sequence at the student's widths of today.

    Dropout masks are left out: off by default, and a small share of what they are made for. So are the gradients of
    decoder and projections that the losses make in their forward: they do not grow with the batch.

    Args:
        student, teacher: axis -> width (`models.axes`); the student may have fewer layers.
        loss: a term of weight 0 saves nothing; without any distillation term the teacher does not run.
        seq_len: tokens of a sequence, padding included.
        masked_rows: rows to predict in a sequence (an expected value).
        vocab_size: rows of the decoder.
        student_bytes, teacher_bytes: bytes of an element of each model's activations.
        lock_step: whether the teacher's layers run beside the student's (distill/teacher_outputs.py).
        keeps_probabilities: whether the student's attention saves them (models/attention.py).
    """
    kl_rows = seq_len if loss.kl_positions == "all" else target_rows
    head_rows = max(target_rows if loss.mlm else 0, kl_rows if loss.kl else 0)
    distils = any((loss.kl, loss.hidden, loss.attention, loss.embedding, loss.cosine, loss.relations))
    ours = _backbone(student, seq_len, student_bytes) + _mlm_head(student["hidden"], head_rows, student_bytes)
    if keeps_probabilities:  # instead of a logarithm a row
        num_heads = sum(student[f"layer.{i}.heads"] for i in range(num_layers(student)))
        ours += num_heads * seq_len * (seq_len * student_bytes - FP32_BYTES)
    terms = target_rows * vocab_size * _logit_bytes(loss, student_bytes, teacher_bytes)
    terms += _score_terms(student, loss, seq_len, student_bytes) + _hidden_terms(student, loss, seq_len, student_bytes)
    terms += _last_layer_terms(student, teacher, loss, seq_len, student_bytes)
    theirs = 0 if lock_step or not distils else teacher_bytes * _taps(teacher, seq_len)
    return SequenceBytes(ours, terms, theirs)


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


def _logit_bytes(loss: LossConfig, student_bytes: int, teacher_bytes: int) -> int:
    """Of one row and entry of the vocabulary: logits of both models, and the gradient with which the way back begins.

    KL on all tokens keeps none of them: its gradients are made in the forward, chunk by chunk.
    """
    if not (loss.mlm or loss.kl) or (loss.kl and loss.kl_positions == "all"):
        return 0
    return 2 * student_bytes + (teacher_bytes if loss.kl else 0)


def _hidden_terms(student: Widths, loss: LossConfig, seq_len: int, element_bytes: int) -> float:
    """The gradient of each comparison, made in the forward."""
    count = (1 if loss.embedding else 0) + (num_layers(student) if loss.hidden else 0)
    return seq_len * count * student["hidden"] * element_bytes


def _score_terms(student: Widths, loss: LossConfig, seq_len: int, element_bytes: int) -> float:
    """The gradients of each layer's queries and keys, made in the forward; in fp32 where the model runs in fp16."""
    if not loss.attention:
        return 0
    layers = range(num_layers(student))
    return sum(2 * seq_len * student[f"layer.{i}.heads"] * student[f"layer.{i}.qk_dim"] for i in layers) * element_bytes


def _last_layer_terms(student: Widths, teacher: Widths, loss: LossConfig, seq_len: int, element_bytes: int) -> float:
    """Relations: gradients of queries, keys and values, twice, as either factor of A A^T. Cosine: what enters W, the
    states behind it and the teacher's in fp32, their norms and the mask.
    """
    relations = 2 * dims_of_last_layer(student) * element_bytes if loss.relations else 0
    row = student["hidden"] * element_bytes + 2 * teacher["hidden"] * FP32_BYTES + 2 * FP32_BYTES + INT64_BYTES
    return seq_len * (relations + (row if loss.cosine else 0))


def _taps(widths: Widths, seq_len: int) -> float:
    """Elements of the embedding output, of every layer's output, and of its queries and keys."""
    layers = range(num_layers(widths))
    queries_and_keys = sum(2 * widths[f"layer.{i}.heads"] * widths[f"layer.{i}.qk_dim"] for i in layers)
    return seq_len * ((1 + len(layers)) * widths["hidden"] + queries_and_keys)
