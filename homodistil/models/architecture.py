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
    """Nothing is normalised behind the sum of a block and its input: norms stand before the blocks, or behind them but
    before the sum, and a final one at the end."""
    has_rotary_positions: bool = False
    is_causal: bool = False
    has_rms_norm: bool = False
    """Norms are RMSNorm, which computes in fp32, instead of LayerNorm. Counted for pre-norm blocks."""
    scales_in_fp32: bool = False
    """RMSNorm multiplies with its weight before it leaves fp32 (Gemma), not after (Llama)."""
    norms_per_layer: int = 2
    """As wide as the residual stream, where `is_pre_norm`: 4 with one before and one behind each block (Gemma 3)."""
    has_head_norms: bool = False
    """Norms of queries and keys (Qwen3, Gemma 3, OLMo 2)."""
    has_fused_qkv: bool = False
    """One linear makes queries, keys and values: parts of one tensor, which lives as long as any of them."""
    activation_tensors: int = 1
    """Tensors, as large as the neurons, that the activation saves for backward: its input, and steps on the way of one
    that is written out (gelu_new)."""
    has_position_bias: bool = False
    """Attention adds to its scores what is learned for distances between tokens: no fused kernel computes it, so that
    its probabilities are saved, and these are no function of queries and keys alone."""


BERT_LIKE = Architecture()
