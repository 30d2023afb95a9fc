"""Where the parts of an encoder with BERT's block are, by dotted name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from transformers.activations import gelu


class LayerNames(NamedTuple):
    """Modules of one layer, by their names inside it. A block without a module of its own (None) is put together from
    its linear and its activation, or from linear, residual and norm."""

    attention: str
    """Calls the library's attention function; its output linear may be a part of it."""
    query: str
    key: str
    value: str
    attention_output: str | None
    attention_linear: str
    attention_norm: str
    ffn: str | None
    ffn_linear: str
    ffn_output: str | None
    ffn_output_linear: str
    ffn_norm: str
    ffn_activation: str | None = None
    """Where `ffn` is None."""


BERT_LAYER = LayerNames(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output",
    attention_linear="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn="intermediate",
    ffn_linear="intermediate.dense",
    ffn_output="output",
    ffn_output_linear="output.dense",
    ffn_norm="output.LayerNorm",
)


class SizeNames(NamedTuple):
    """Attributes of the attention module that remember sizes."""

    heads: str
    head_dim: str
    all_heads: str
    """Dims of all heads together."""


BERT_SIZES = SizeNames("num_attention_heads", "attention_head_size", "all_head_size")


class HeadNames(NamedTuple):
    """The MLM head. `head` is the module of all of it, `transform` of all that comes before the decoder; None where
    there is no such."""

    head: str | None
    linear: str
    norm: str
    decoder: str
    transform: str | None
    activation: str | Callable[[Tensor], Tensor]
    """Name of a module, or a function."""


ROBERTA_HEAD = HeadNames(
    head="lm_head",
    linear="lm_head.dense",
    norm="lm_head.layer_norm",
    decoder="lm_head.decoder",
    transform=None,
    activation=gelu,
)
"""Of RoBERTa, and of MPNet."""
