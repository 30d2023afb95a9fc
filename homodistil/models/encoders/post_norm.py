"""Masked language models with a LayerNorm after each residual block, as data: where the parts are, by dotted name.

BERT's block: LayerNorm(linear(heads) + x), then LayerNorm(linear(activation(linear(x))) + x). The axis table, the sizes
that modules remember, the parts that compensation refits and the stock configuration all follow from the names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.axes import (
    AxisTable,
    AxisUse,
    Widths,
    layer_widths,
    linear_uses,
    num_layers,
    uniform_layer_widths,
)
from homodistil.models.family import Compensable, HeadParts, LayerParts, ModelShape
from homodistil.models.module_sizes import refresh_sizes
from homodistil.models.named_family import NamedFamily


class LayerNames(NamedTuple):
    """Modules of one layer, by their names inside it."""

    attention: str
    """Calls the library's attention function."""
    query: str
    key: str
    value: str
    attention_output: str
    attention_linear: str
    attention_norm: str
    ffn: str
    ffn_linear: str
    ffn_output: str
    ffn_output_linear: str
    ffn_norm: str


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


class HeadNames(NamedTuple):
    """The MLM head. `transform` is the module of all that comes before the decoder, None where there is no such."""

    head: str
    linear: str
    norm: str
    decoder: str
    transform: str | None
    activation: str | Callable[[Tensor], Tensor]
    """Name of a module, or a function."""


@dataclass(frozen=True, kw_only=True)
class PostNormEncoder(NamedFamily, Compensable):
    """A family of such models."""

    head_names: HeadNames
    layer_names: LayerNames = BERT_LAYER
    embedding_tables: tuple[str, ...] = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    layers_name: str = "encoder.layer"
    attention_name: str = BERT_LAYER.attention
    dropout_fields: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    positions_start_behind_padding: bool = False
    """The first position id is pad_token_id + 1, so that fewer tokens fit than there are position embeddings."""
    auto_class: str = "AutoModelForMaskedLM"
    pipeline_tag: str = "fill-mask"

    def shape(self, config: PretrainedConfig) -> ModelShape:
        spent = config.pad_token_id + 1 if self.positions_start_behind_padding else 0
        return ModelShape(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_tokens=config.max_position_embeddings - spent,
        )

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        layer = layer_widths(widths, 0)
        values = teacher.to_dict()
        values |= {
            "hidden_size": widths["hidden"],
            "intermediate_size": layer.intermediate_size,
            "num_attention_heads": layer.num_heads,
            "num_hidden_layers": num_layers(widths),
        }
        return type(teacher)(**values)

    def stock_head_dim(self, widths: Widths) -> int | None:
        """hidden_size = heads x head size in every layer, and one size for all layers; narrower heads are padded."""
        layer = uniform_layer_widths(widths)
        if layer is None:
            return None
        fits = widths["hidden"] % layer.num_heads == 0 and widths["hidden"] // layer.num_heads >= layer.qk_dim
        return widths["hidden"] // layer.num_heads if fits else None

    def axis_table(self, model: nn.Module) -> AxisTable:
        names = {name for name, _ in model.named_parameters()}
        uses = self._shared_uses() + [u for i in range(model.config.num_hidden_layers) for u in self._layer_uses(i)]
        return AxisTable(self._widths(model), tuple(u for u in uses if u.parameter in names))

    def _widths(self, model: nn.Module) -> dict[str, int]:
        # From what `refresh` keeps, not from the weights: under ZeRO-3 these are empty between uses.
        widths = {"hidden": self.embeddings(model).word_embeddings.embedding_dim}
        for i, (parts, attention) in enumerate(zip(self.layer_parts(model), self.attentions(model), strict=True)):
            widths[f"layer.{i}.ffn"] = parts.ffn_linear.out_features
            widths[f"layer.{i}.heads"] = attention.num_attention_heads
            widths[f"layer.{i}.qk_dim"] = attention.attention_head_size
            widths[f"layer.{i}.vo_dim"] = attention.attention_head_size
        return widths

    def _shared_uses(self) -> list[AxisUse]:
        embeddings, head = f"{self.backbone_name}.embeddings", self.head_names
        uses = [AxisUse(f"{embeddings}.{table}.weight", 1, ("hidden",)) for table in self.embedding_tables]
        uses += _vector(f"{embeddings}.LayerNorm")
        uses += [AxisUse(f"{head.linear}.weight", dim, ("hidden",)) for dim in (0, 1)]
        uses += [AxisUse(f"{head.linear}.bias", 0, ("hidden",))]
        uses += _vector(head.norm)
        # Present only when the decoder is not tied to the word embeddings.
        return uses + [AxisUse(f"{head.decoder}.weight", 1, ("hidden",))]

    def _layer_uses(self, i: int) -> list[AxisUse]:
        layer, names = f"{self.backbone_name}.{self.layers_name}.{i}", self.layer_names
        qk = (f"layer.{i}.heads", f"layer.{i}.qk_dim")
        vo = (f"layer.{i}.heads", f"layer.{i}.vo_dim")
        ffn = (f"layer.{i}.ffn",)
        uses = linear_uses(f"{layer}.{names.query}", out=qk, into=("hidden",))
        uses += linear_uses(f"{layer}.{names.key}", out=qk, into=("hidden",))
        uses += linear_uses(f"{layer}.{names.value}", out=vo, into=("hidden",))
        uses += linear_uses(f"{layer}.{names.attention_linear}", out=("hidden",), into=vo)
        uses += _vector(f"{layer}.{names.attention_norm}")
        uses += linear_uses(f"{layer}.{names.ffn_linear}", out=ffn, into=("hidden",))
        uses += linear_uses(f"{layer}.{names.ffn_output_linear}", out=("hidden",), into=ffn)
        return uses + _vector(f"{layer}.{names.ffn_norm}")

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        refresh_sizes(model, self.axis_table(model).with_widths(widths))
        for i, attention in enumerate(self.attentions(model)):
            layer = layer_widths(widths, i)
            attention.num_attention_heads, attention.attention_head_size = layer.num_heads, layer.qk_dim
            attention.all_head_size = layer.num_heads * layer.qk_dim
        model.config.hidden_size = widths["hidden"]

    @torch.no_grad()
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        for parts in self.layer_parts(model):
            parts.query.weight.mul_(ratio)
            parts.query.bias.mul_(ratio)

    def embeddings(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).embeddings

    def attend(self, model: nn.Module, i: int, hidden: Tensor, seen: Tensor | None) -> Tensor:
        return self.attentions(model)[i](hidden, attention_mask=seen)[0]

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        parts = self.layer_parts(model)[-1]
        return [*([parts.value] if with_values else []), parts.attention_output, parts.ffn, parts.ffn_output]

    def final_norm(self, model: nn.Module) -> None:
        return None

    def lm_head(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.head_names.head)

    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.head_names.transform is not None:
            return model.get_submodule(self.head_names.transform)
        return functools.partial(_transformed, self.head_parts(model))

    def decoder(self, model: nn.Module) -> nn.Linear:
        return model.get_submodule(self.head_names.decoder)

    def layer_parts(self, model: nn.Module) -> list[LayerParts]:
        return [self._layer_parts(layer) for layer in self.layers(model)]

    def _layer_parts(self, layer: nn.Module) -> LayerParts:
        return LayerParts(
            **{field: layer.get_submodule(getattr(self.layer_names, field)) for field in LayerParts._fields}
        )

    def head_parts(self, model: nn.Module) -> HeadParts:
        names = self.head_names
        activation = names.activation if callable(names.activation) else model.get_submodule(names.activation)
        return HeadParts(model.get_submodule(names.linear), activation, model.get_submodule(names.norm))

    def embedding_norm(self, model: nn.Module) -> nn.LayerNorm:
        return self.embeddings(model).LayerNorm

    def layer_norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        inside = self.backbone(model).named_modules()
        return {name: module for name, module in inside if isinstance(module, nn.LayerNorm)}

    def tensor_name(self, stored: str) -> str:
        """LayerNorms had gamma and beta, an encoder alone no prefix."""
        is_encoder_alone = stored.startswith(("embeddings.", "encoder.", "pooler."))
        name = f"{self.backbone_name}.{stored}" if is_encoder_alone else stored
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORM_NAMES[m[1]]}", name)


_NORM_NAMES = {"gamma": "weight", "beta": "bias"}


def _transformed(parts: HeadParts, rows: Tensor) -> Tensor:
    return parts.norm(parts.activation(parts.linear(rows)))


def _vector(name: str) -> list[AxisUse]:
    return [AxisUse(f"{name}.weight", 0, ("hidden",)), AxisUse(f"{name}.bias", 0, ("hidden",))]
