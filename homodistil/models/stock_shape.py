"""The sizes of a stock configuration that a student may have fewer of, layers apart."""

from __future__ import annotations

from typing import NamedTuple

from homodistil.models.axes import Widths, layer_widths


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int


def shape_of(widths: Widths) -> Shape:
    layer = layer_widths(widths, 0)
    return Shape(widths["hidden"], layer.intermediate_size, layer.num_heads)


def is_grouped(widths: Widths) -> bool:
    """Whether query heads share keys and values in groups; then the dims of a head stay what they are (rotary)."""
    return "layer.0.kv_heads" in widths
