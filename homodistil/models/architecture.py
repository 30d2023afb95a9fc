"""What FLOPs and bytes depend on beside widths."""

from __future__ import annotations

from typing import NamedTuple


class Architecture(NamedTuple):
    """Kinds of blocks, the same in all layers. The defaults are BERT's."""

    has_gated_mlp: bool = False
    """Two linears make the neurons (SwiGLU, GeGLU) instead of one."""
    has_head_transform: bool = True
    """The vocabulary head has a linear, an activation and a norm before its decoder."""
    is_pre_norm: bool = False
    """A norm before each block, and a final one, instead of one behind each block."""
    has_rotary_positions: bool = False
    is_causal: bool = False


BERT_LIKE = Architecture()
