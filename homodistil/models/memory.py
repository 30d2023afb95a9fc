"""Bytes that a rank holds during a training step, from shapes alone: what does not depend on the batch, and what each
sequence adds to it in the model. distill/cost.py adds what the terms of the objective save; training/micro_batch.py
compares the sums at two widths.

Counted at the moment where the backward pass begins, when everything saved for it is alive. Not counted, because it
is short-lived: what one operation needs while it runs, and buckets and gathered parameters on their way between ranks;
and what a micro-batch has once, however many sequences it is of: rotary tensors, and the masks of windows.
tests/unit/models/test_step_memory.py holds the counts against what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import LayerWidths, Widths, embedding_width, layer_widths, num_layers

FP32_BYTES = 4
INT64_BYTES = 8
_LAYER_NORM_BYTES = 2 * FP32_BYTES  # mean and reciprocal deviation of a row


@dataclass(frozen=True)
class StateLayout:
    """How DeepSpeed spreads weights, gradients and AdamW's state over the ranks."""

    stage: int
    num_ranks: int
    dtype: torch.dtype
    """Type of the model's weights."""
    accumulation_dtype: torch.dtype
    """Type of the gradients while they are accumulated."""
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


def backbone_bytes(widths: Widths, seq_len: int, element_bytes: int, architecture: Architecture = BERT_LIKE) -> float:
    """Saved for one sequence: embeddings (ids, and what the first norm sees) and the layers."""
    layer = _pre_norm_layer if architecture.is_pre_norm else _post_norm_layer
    layers = sum(layer(widths, i, element_bytes, architecture) for i in range(num_layers(widths)))
    if architecture.is_pre_norm:
        return seq_len * (layers + INT64_BYTES + _norm(widths["hidden"], element_bytes, architecture))  # the final one
    # What the norm of the embeddings sees, and a linear behind it, where there is one.
    embeddings = embedding_width(widths) + widths.get("embedding", 0)
    return seq_len * (layers + 2 * INT64_BYTES + _LAYER_NORM_BYTES + embeddings * element_bytes)


def _post_norm_layer(widths: Widths, i: int, element_bytes: int, architecture: Architecture) -> float:
    """Bytes of a token. The layer's input, both sums before a LayerNorm, what lies between the blocks."""
    elements = 4 * widths["hidden"] + _inside(widths, i, architecture)
    return elements * element_bytes + 2 * _LAYER_NORM_BYTES + _log_sum_exp(widths, i)


def _pre_norm_layer(widths: Widths, i: int, element_bytes: int, architecture: Architecture) -> float:
    """Bytes of a token: what the norms keep, and what enters both blocks."""
    layer = layer_widths(widths, i)
    norms = architecture.norms_per_layer * _norm(widths["hidden"], element_bytes, architecture)
    norms += 2 * widths["hidden"] * element_bytes
    if architecture.has_head_norms:
        norms += (layer.num_heads + layer.num_kv_heads) * _norm(layer.qk_dim, element_bytes, architecture)
    return norms + _inside(widths, i, architecture) * element_bytes + _log_sum_exp(widths, i)


def _inside(widths: Widths, i: int, architecture: Architecture) -> int:
    """Elements of a token inside both blocks: query and attention output, key and value; neurons before and after the
    activation, and of a gated block also what the activation is multiplied with, and the product."""
    layer = layer_widths(widths, i)
    heads = layer.num_heads * (layer.qk_dim + layer.vo_dim) + layer.num_kv_heads * (layer.qk_dim + layer.vo_dim)
    heads += _before_rotation(layer, architecture)
    num_neurons = architecture.activation_tensors + (3 if architecture.has_gated_mlp else 1)
    return heads + num_neurons * layer.intermediate_size


def _before_rotation(layer: LayerWidths, architecture: Architecture) -> int:
    """Elements of a token's queries and keys that stay as a fused linear put them out, because its values are a part of
    the same tensor."""
    stays = architecture.has_fused_qkv and architecture.has_rotary_positions
    return (layer.num_heads + layer.num_kv_heads) * layer.qk_dim if stays else 0


def _log_sum_exp(widths: Widths, i: int) -> int:
    """Of the fused attention, which saves no scores."""
    return layer_widths(widths, i).num_heads * FP32_BYTES


def _norm(size: int, element_bytes: int, architecture: Architecture) -> int:
    """What a norm of `size` elements keeps: its input and statistics. RMSNorm: its input in fp32 with the reciprocal
    root of its mean square, and the quotient."""
    if not architecture.has_rms_norm:
        return size * element_bytes + _LAYER_NORM_BYTES
    quotient_bytes = FP32_BYTES if architecture.scales_in_fp32 else element_bytes
    return size * (FP32_BYTES + quotient_bytes) + FP32_BYTES


def probability_bytes(
    widths: Widths, seq_len: int, element_bytes: int, architecture: Architecture = BERT_LIKE
) -> float:
    """More than `backbone_bytes` where attention saves its probabilities, instead of a logarithm for each row, and
    keys and values of a group once for each of its query heads; its products copy the values out of what a fused
    linear put out."""
    layers = [layer_widths(widths, i) for i in range(num_layers(widths))]
    num_heads = sum(layer.num_heads for layer in layers)
    repeated = sum((layer.num_heads - layer.num_kv_heads) * (layer.qk_dim + layer.vo_dim) for layer in layers)
    freed = sum(_before_rotation(layer, architecture) for layer in layers)
    return seq_len * (num_heads * (seq_len * element_bytes - FP32_BYTES) + (repeated - freed) * element_bytes)


def head_bytes(widths: Widths, rows: float, element_bytes: int, architecture: Architecture = BERT_LIKE) -> float:
    """Saved by the vocabulary head before its decoder: input, before and after GELU, after LayerNorm; without a
    transform the rows and, made in the forward chunk by chunk, their gradient."""
    hidden, decoder_width = widths["hidden"], embedding_width(widths)
    if not architecture.has_head_transform:
        return rows * 2 * hidden * element_bytes
    return rows * ((hidden + 3 * decoder_width) * element_bytes + _LAYER_NORM_BYTES) if rows else 0


def compared_elements(widths: Widths, seq_len: int, architecture: Architecture = BERT_LIKE) -> float:
    """Elements that one sequence's pass leaves: the embedding output, every layer's output, and its queries and keys,
    with the values that these cannot be freed without."""
    layers = [layer_widths(widths, i) for i in range(num_layers(widths))]
    heads = sum((layer.num_heads + layer.num_kv_heads) * layer.qk_dim for layer in layers)
    if architecture.has_fused_qkv and not architecture.has_rotary_positions:  # rotation copies queries and keys
        heads += sum(layer.num_kv_heads * layer.vo_dim for layer in layers)
    return seq_len * ((1 + len(layers)) * widths["hidden"] + heads)
