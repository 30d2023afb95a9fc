"""Model FLOPs from shapes alone: layers and head. distill/cost.py adds what the terms of the objective need; with the
peak of the device (metrics/device_peak.py) that is the MFU.

A multiply-add is 2 FLOPs. Counted: every matrix product the mathematics asks for. Not counted: embedding look-ups,
LayerNorm, softmax, GELU, the optimizer, and anything a kernel recomputes to save memory. Attention products are
counted over the full (seq_len, seq_len) square, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

from homodistil.models.axes import Widths, layer_widths, num_layers


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


def backbone_flops(widths: Widths, tokens: float, seq_len: int) -> float:
    """One forward pass of all layers over `tokens`, in sequences of `seq_len`."""
    return sum(_layer(widths, i, tokens, seq_len) for i in range(num_layers(widths)))


def _layer(widths: Widths, i: int, tokens: float, seq_len: int) -> float:
    layer = layer_widths(widths, i)
    qk, vo = layer.num_heads * layer.qk_dim, layer.num_heads * layer.vo_dim
    # Query, key; value, output; the two of the feed-forward block.
    weights = widths["hidden"] * (2 * qk + 2 * vo + 2 * layer.intermediate_size)
    products = seq_len * (qk + vo)  # scores; weighted sum
    return 2 * tokens * (weights + products)


def head_flops(hidden: int, rows: float, vocab_size: int) -> float:
    """One forward pass of the vocabulary head over `rows`: transform and decoder."""
    return 2 * rows * hidden * (hidden + vocab_size)
