"""Masked language models with a LayerNorm after each residual block, as data: where the parts are, by dotted name.

BERT's block: LayerNorm(linear(heads) + x), then LayerNorm(linear(activation(linear(x))) + x). The axis table, the sizes
that modules remember, the parts that compensation refits and the stock configuration all follow from the names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.architecture import BERT_LIKE, Architecture
from homodistil.models.axes import (
    AxisUse,
    Widths,
    layer_widths,
    linear_uses,
    num_layers,
    uniform_layer_widths,
)
from homodistil.models.classifier import (
    Classifier,
    ClassifierNames,
    classifier_of,
    classifier_uses,
    token_classifier_of,
    token_classifier_uses,
)
from homodistil.models.compensable import Block, Compensable, HeadLinears, HeadParts
from homodistil.models.encoders.block_names import (
    BERT_LAYER,
    BERT_SIZES,
    HeadNames,
    LayerModules,
    LayerNames,
    SizeNames,
)
from homodistil.models.model_shape import ModelShape
from homodistil.models.module_sizes import refresh_sizes
from homodistil.models.named_family import NamedFamily
from homodistil.models.norms import Norm


@dataclass(frozen=True, kw_only=True)
class PostNormEncoder(NamedFamily, Compensable):
    """A family of such models."""

    head_names: HeadNames
    layer_names: LayerNames = BERT_LAYER
    size_names: SizeNames = BERT_SIZES
    embedding_tables: tuple[str, ...] = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    backbone_parts: tuple[str, ...] = ("embeddings.", "encoder.", "pooler.")
    """Beginnings of names of tensors in a checkpoint of the backbone alone."""
    layers_name: str = "encoder.layer"
    attention_name: str = BERT_LAYER.attention
    dropout_fields: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    positions_start_behind_padding: bool = False
    """The first position id is pad_token_id + 1, so that fewer tokens fit than there are position embeddings."""
    classifier_names: ClassifierNames | None = None
    architecture: Architecture = BERT_LIKE
    auto_class: str = "AutoModelForMaskedLM"
    pipeline_tag: str = "fill-mask"

    def shape(self, config: PretrainedConfig) -> ModelShape:
        spent = config.pad_token_id + 1 if self.positions_start_behind_padding else 0
        num_heads, hidden_size = config.num_attention_heads, config.hidden_size
        return ModelShape(
            hidden_size=hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=hidden_size // num_heads,
            intermediate_size=getattr(config, self.field("intermediate_size")),
            vocab_size=config.vocab_size,
            max_tokens=config.max_position_embeddings - spent,
        )

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        layer = layer_widths(widths, 0)
        sizes = {
            "hidden_size": widths["hidden"],
            "intermediate_size": layer.intermediate_size,
            "num_attention_heads": layer.num_heads,
            "num_hidden_layers": num_layers(widths),
        }
        values = teacher.to_dict() | {self.field(name): size for name, size in sizes.items()}
        return type(teacher)(**values)

    def stock_head_dim(self, widths: Widths) -> int | None:
        """hidden_size = heads x head size in every layer, and one size for all layers; narrower heads are padded."""
        layer = uniform_layer_widths(widths)
        if layer is None:
            return None
        fits = widths["hidden"] % layer.num_heads == 0 and widths["hidden"] // layer.num_heads >= layer.qk_dim
        return widths["hidden"] // layer.num_heads if fits else None

    def _widths(self, model: nn.Module) -> dict[str, int]:
        widths = self._shared_widths(model)
        for i, attention in enumerate(self.attentions(model)):
            widths[f"layer.{i}.ffn"] = self.modules(model, i).ffn_linear.out_features
            widths[self._heads(i)] = getattr(attention, self.size_names.heads)
            widths[f"layer.{i}.qk_dim"] = getattr(attention, self.size_names.head_dim)
            widths[f"layer.{i}.vo_dim"] = getattr(attention, self.size_names.head_dim)
        return widths | self._classifier_widths(model)

    def _heads(self, i: int) -> str:
        """The axis of the heads of layer `i`."""
        return f"layer.{i}.heads"

    def _shared_widths(self, model: nn.Module) -> dict[str, int]:
        return {"hidden": self.embeddings(model).word_embeddings.embedding_dim}

    def _shared_uses(self, model: nn.Module, embedding: str = "hidden") -> list[AxisUse]:
        """What is in no layer. `embedding`: the axis that embeddings and what enters the decoder run over."""
        embeddings, head = f"{self.backbone_name}.embeddings", self.head_names
        uses = [AxisUse(f"{embeddings}.{table}.weight", 1, (embedding,)) for table in self.embedding_tables]
        uses += _vector(f"{embeddings}.LayerNorm", embedding)
        uses += linear_uses(head.linear, out=(embedding,), into=("hidden",))
        uses += _vector(head.norm, embedding)
        # Present only when the decoder is not tied to the word embeddings.
        uses += [AxisUse(f"{head.decoder}.weight", 1, (embedding,))]
        return uses + self._classifier_uses(model)

    def _classifier_uses(self, model: nn.Module) -> list[AxisUse]:
        if self.labels_tokens(model):
            return token_classifier_uses()
        return classifier_uses(self.classifier_names) if self.has_classifier(model) else []

    def _layer_uses(self, i: int) -> list[AxisUse]:
        layer, names = f"{self.backbone_name}.{self.layers_name}.{i}", self.layer_names
        qk = (self._heads(i), f"layer.{i}.qk_dim")
        vo = (self._heads(i), f"layer.{i}.vo_dim")
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
            sizes = SizeNames(layer.num_heads, layer.qk_dim, layer.num_heads * layer.qk_dim)
            for name, size in zip(self.size_names, sizes, strict=True):
                setattr(attention, name, size)
        model.config.hidden_size = widths["hidden"]

    @torch.no_grad()
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        for i in range(len(self.layers(model))):
            query = self.modules(model, i).query
            query.weight.mul_(ratio)
            query.bias.mul_(ratio)

    def embeddings(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).embeddings

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        parts = self.modules(model, -1)
        attention, ffn = [parts.attention_linear, parts.attention_norm], [parts.ffn_output_linear, parts.ffn_norm]
        return [*([parts.value] if with_values else []), *attention, parts.ffn_linear, *ffn]

    def final_norm(self, model: nn.Module) -> None:
        return None

    def lm_head(self, model: nn.Module) -> nn.Module:
        if self.head_names.head is not None:
            return model.get_submodule(self.head_names.head)
        parts = self.head_parts(model)
        return nn.Sequential(parts.linear, parts.activation, parts.norm.module, self.decoder(model))

    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.head_names.transform is not None:
            return model.get_submodule(self.head_names.transform)
        return functools.partial(_transformed, self.head_parts(model))

    def decoder(self, model: nn.Module) -> nn.Linear:
        return model.get_submodule(self.head_names.decoder)

    def modules(self, model: nn.Module, i: int) -> LayerModules:
        """The parts of layer `i`."""
        return self.layer_names.modules(self.layers(model)[i])

    def blocks(self, model: nn.Module, i: int) -> tuple[Block, Block]:
        of, norm = self.modules(model, i), self.norm
        qkv = (of.query, of.key, of.value)
        return (
            Block(None, qkv, of.attention_linear, None, norm(of.attention_norm)),
            Block(None, (of.ffn_linear,), of.ffn_output_linear, None, norm(of.ffn_norm), inner=of.ffn),
        )

    def head_linears(self, model: nn.Module, i: int) -> HeadLinears:
        of = self.modules(model, i)
        return HeadLinears(of.query, of.key, of.value, of.attention_linear)

    def head_parts(self, model: nn.Module) -> HeadParts:
        names = self.head_names
        activation = names.activation if callable(names.activation) else model.get_submodule(names.activation)
        return HeadParts(model.get_submodule(names.linear), activation, self.norm(model.get_submodule(names.norm)))

    @property
    def has_classifiers(self) -> bool:
        return self.classifier_names is not None

    def classifier(self, model: nn.Module) -> Classifier:
        return token_classifier_of(model) if self.labels_tokens(model) else classifier_of(self.classifier_names, model)

    def has_token_types(self, config: PretrainedConfig) -> bool:
        return "token_type_embeddings" in self.embedding_tables and config.type_vocab_size > 1

    def embedding_norm(self, model: nn.Module) -> Norm:
        return self.norm(self.embeddings(model).LayerNorm)

    def layer_norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        inside = self.backbone(model).named_modules()
        return {name: module for name, module in inside if isinstance(module, nn.LayerNorm)}

    def tensor_name(self, stored: str) -> str:
        """LayerNorms had gamma and beta, an encoder alone no prefix."""
        name = f"{self.backbone_name}.{stored}" if stored.startswith(self.backbone_parts) else stored
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORM_NAMES[m[1]]}", name)


_NORM_NAMES = {"gamma": "weight", "beta": "bias"}


def _transformed(parts: HeadParts, rows: Tensor) -> Tensor:
    return parts.norm.module(parts.activation(parts.linear(rows)))


def _vector(name: str, axis: str = "hidden") -> list[AxisUse]:
    return [AxisUse(f"{name}.weight", 0, (axis,)), AxisUse(f"{name}.bias", 0, (axis,))]
