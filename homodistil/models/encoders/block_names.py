"""Where the parts of an encoder with BERT's block are, by dotted name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import gelu

from homodistil.models.classifier import ClassifierNames


class LayerModules(NamedTuple):
    """What compensation, the axis table and export ask for of one layer."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_linear: nn.Module
    attention_norm: nn.Module
    ffn: nn.Module
    """Residual stream -> activated neurons, as its result or on the way to it."""
    ffn_linear: nn.Module
    ffn_output_linear: nn.Module
    ffn_norm: nn.Module


class LayerNames(NamedTuple):
    """Modules of one layer, by their names inside it: those of `LayerModules`, and what computes attention."""

    attention: str
    """Calls the library's attention function; its output linear may be a part of it."""
    query: str
    key: str
    value: str
    attention_linear: str
    attention_norm: str
    ffn: str
    ffn_linear: str
    ffn_output_linear: str
    ffn_norm: str

    def modules(self, layer: nn.Module) -> LayerModules:
        return LayerModules(*(layer.get_submodule(getattr(self, field)) for field in LayerModules._fields))


BERT_LAYER = LayerNames(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_linear="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn="intermediate",
    ffn_linear="intermediate.dense",
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

ROBERTA_CLASSIFIER = ClassifierNames(
    "classifier.dense", torch.tanh, "classifier.out_proj", "classifier.dropout", drops_first=True
)
"""Of the same."""
