"""MPNet (Song et al. 2020): Hugging Face's `MPNetForMaskedLM`.

BERT's layers, without token types. What differs: every head adds to its scores what it has learned for the distance of
query and key. One table has that for all layers, a column for each head, so that the same heads go in all layers. The
stock class computes attention by itself, so queries and keys are read behind their linears; and it divides the scores
by the root of the present dims of a head, which a hook undoes: the softmax keeps the scale of the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.activations import shows_values
from homodistil.models.architecture import Architecture
from homodistil.models.axes import AxisUse, Widths
from homodistil.models.encoders.block_names import BERT_LAYER, ROBERTA_CLASSIFIER, ROBERTA_HEAD
from homodistil.models.encoders.post_norm import PostNormEncoder
from homodistil.models.model_shape import ModelShape

_ATTENTION = "attention.attn"
_BIAS = "encoder.relative_attention_bias"
_FIRST_POSITION = 2
"""Of a text, whatever the id of the padding token."""


@dataclass(frozen=True, kw_only=True)
class PositionBiasEncoder(PostNormEncoder):
    """A family with such a table."""

    calls_attention_functions = False

    def shape(self, config: PretrainedConfig) -> ModelShape:
        return super().shape(config)._replace(max_tokens=config.max_position_embeddings - _FIRST_POSITION)

    def _heads(self, i: int) -> str:
        return "heads"

    def _shared_uses(self, model: nn.Module, embedding: str = "hidden") -> list[AxisUse]:
        table = AxisUse(f"{self.backbone_name}.{_BIAS}.weight", 1, ("heads",))
        return [*super()._shared_uses(model, embedding), table]

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        super().refresh(model, widths)
        self.backbone(model).encoder.n_heads = widths["heads"]

    def softmax_scale(self, model: nn.Module) -> float:
        return self.attentions(model)[0].attention_head_size ** -0.5

    def tap_attention(self, model: nn.Module, record: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        for attention in self.attentions(model):
            _Tap(attention, record)

    def attention_mask(self, config: PretrainedConfig, input_ids: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """The stock class adds its mask to the scores, so the library has to make one of numbers of it."""
        return padding_mask

    def layer_options(
        self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], padding_mask: Tensor | None
    ) -> Sequence[Mapping[str, Any]]:
        """The model's own bias; and the mask in its dtype, so that scores stay in it."""
        mask, lowest = kwargs["attention_mask"], torch.finfo(hidden.dtype).min
        mask = None if mask is None else mask.clamp(min=lowest).to(hidden.dtype)
        bias = self.backbone(model).encoder.compute_position_bias(hidden)
        return [{"attention_mask": mask, "position_bias": bias}] * len(self.layers(model))


class _Tap:
    """Hooks on the linears of one attention module."""

    def __init__(self, attention: nn.Module, record: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
        self._attention, self._record = attention, record
        self._first_head_dim = attention.attention_head_size
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        attention.q.register_forward_hook(self._after_queries)
        attention.k.register_forward_hook(self._after_keys)
        attention.v.register_forward_hook(self._after_values)

    def _heads(self, output: Tensor) -> Tensor:
        """(B, T, N x H) -> (B, N, T, H)."""
        return output.unflatten(-1, (-1, self._attention.attention_head_size)).transpose(1, 2)

    def _after_queries(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        self._queries = self._heads(output)
        if self._attention.attention_head_size == self._first_head_dim:
            return None
        return output * math.sqrt(self._attention.attention_head_size / self._first_head_dim)

    def _after_keys(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self._keys = self._heads(output)

    def _after_values(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        values = self._heads(output) if shows_values(self._attention) else None
        self._record(self._queries, self._keys, values)
        self._queries = self._keys = None


MPNET = PositionBiasEncoder(
    name="mpnet",
    model_types=("mpnet",),
    backbone_name="mpnet",
    embedding_tables=("word_embeddings", "position_embeddings"),
    layer_names=BERT_LAYER._replace(
        attention=_ATTENTION,
        query=f"{_ATTENTION}.q",
        key=f"{_ATTENTION}.k",
        value=f"{_ATTENTION}.v",
        attention_linear=f"{_ATTENTION}.o",
        attention_norm="attention.LayerNorm",
    ),
    attention_name=_ATTENTION,
    head_names=ROBERTA_HEAD,
    classifier_names=ROBERTA_CLASSIFIER,
    head_prefix="lm_head.",
    unused=(
        "mpnet.pooler.",
        "mpnet.embeddings.position_ids",
        "lm_head.decoder.",  # tied, in files that store it all the same
    ),
    architecture=Architecture(has_position_bias=True),
)
