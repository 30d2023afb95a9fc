"""Model FLOPs from shapes alone: layers and head. distill/cost.py adds what the terms of the objective need; with the
peak of the device (metrics/device_peak.py) that is the MFU.

A multiply-add is 2 FLOPs. Counted: every matrix product the mathematics asks for. Not counted: embedding look-ups,
LayerNorm, softmax, GELU, the optimizer, and anything a kernel recomputes to save memory. Attention products are
counted over the full (seq_len, seq_len) square, padding and what a causal mask hides included.
"""

from __future__ import annotations

from dataclasses import dataclass

from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import Widths, embedding_width, layer_widths, num_layers


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over the whole global batch (all ranks together)."""

    teacher: float
    """Forward of the frozen teacher."""
    student: float
    """Forward and backward of the student."""
    losses: float
    """What the terms compute in addition to the models: projections and recomputed scores, with their backward."""

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.losses


def backbone_flops(widths: Widths, tokens: float, seq_len: int, architecture: Architecture = BERT_LIKE) -> float:
    """One forward pass of all layers over `tokens`, in sequences of `seq_len`, and of a linear in front of them."""
    layers = sum(_layer(widths, i, tokens, seq_len, architecture) for i in range(num_layers(widths)))
    return layers + 2 * tokens * widths.get("embedding", 0) * widths["hidden"]


def _layer(widths: Widths, i: int, tokens: float, seq_len: int, architecture: Architecture) -> float:
    layer = layer_widths(widths, i)
    qk, vo = layer.num_heads * layer.qk_dim, layer.num_heads * layer.vo_dim
    kv = layer.num_kv_heads * (layer.qk_dim + layer.vo_dim)
    num_ffn = 3 if architecture.has_gated_mlp else 2
    # Query and output; key and value; the linears of the feed-forward block.
    weights = widths["hidden"] * (qk + vo + kv + num_ffn * layer.intermediate_size)
    products = seq_len * (qk + vo)  # scores; weighted sum
    return 2 * tokens * (weights + products)


def head_flops(widths: Widths, rows: float, vocab_size: int, architecture: Architecture = BERT_LIKE) -> float:
    """One forward pass of the vocabulary head over `rows`: transform, where there is one, and decoder."""
    decoder_width = embedding_width(widths)
    return 2 * rows * decoder_width * ((widths["hidden"] if architecture.has_head_transform else 0) + vocab_size)
