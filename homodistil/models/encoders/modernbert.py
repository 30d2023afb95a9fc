"""ModernBERT (Warner et al. 2024) and models of its class, as the Ettin encoders: `ModernBertForMaskedLM`.

The block: x + Wo(heads(norm(x))), then x + Wo(act(input) * gate) of norm(x). One linear makes queries, keys and values,
one the two halves of the gated neurons. The norm in front of layer 0 is left out: the embeddings end with one.

Layers see all tokens or a window, each kind with rotary frequencies of its own. Rotary positions fix the dims of a
head, and the stock class has hidden_size = heads x dims of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.kernels.attention_map_inputs import MaskKind
from homodistil.models.architecture import Architecture
from homodistil.models.axes import (
    AxisUse,
    Widths,
    layer_widths,
    linear_uses,
    num_layers,
    uniform_layer_widths,
)
from homodistil.models.classifier import CLASSIFIER_AXIS, Classifier
from homodistil.models.compensable import Block, Compensable, HeadParts
from homodistil.models.model_shape import ModelShape
from homodistil.models.module_sizes import refresh_sizes
from homodistil.models.named_family import NamedFamily
from homodistil.models.norms import Norm

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WITHOUT_HEAD = ("embeddings.", "layers.", "final_norm.")


@dataclass(frozen=True, kw_only=True)
class ModernBertFamily(NamedFamily, Compensable):
    """A family of such models."""

    backbone_name: str = "model"
    layers_name: str = "layers"
    attention_name: str = "attn"
    head_prefix: tuple[str, ...] = ("head.", "decoder.")
    dropout_fields: tuple[str, ...] = ("attention_dropout", "embedding_dropout", "mlp_dropout")
    auto_class: str = "AutoModelForMaskedLM"
    pipeline_tag: str = "fill-mask"
    architecture: Architecture = Architecture(
        has_gated_mlp=True, is_pre_norm=True, has_rotary_positions=True, has_fused_qkv=True
    )
    whole_heads: bool = True
    has_classifiers: bool = True
    unused: tuple[str, ...] = ("decoder.weight",)  # tied, in files that store it all the same

    def shape(self, config: PretrainedConfig) -> ModelShape:
        return ModelShape(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_tokens=config.max_position_embeddings,
        )

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        layer = layer_widths(widths, 0)
        values = teacher.to_dict() | {
            "hidden_size": widths["hidden"],
            "intermediate_size": layer.intermediate_size,
            "num_attention_heads": layer.num_heads,
            "num_hidden_layers": num_layers(widths),
            "layer_types": teacher.layer_types[: num_layers(widths)],
        }
        return type(teacher)(**values)

    def stock_head_dim(self, widths: Widths) -> int | None:
        """The size of the heads, if all layers are alike and they make up the hidden size."""
        layer = uniform_layer_widths(widths)
        fits = layer is not None and widths["hidden"] == layer.num_heads * layer.qk_dim
        return layer.qk_dim if fits else None

    def _widths(self, model: nn.Module) -> dict[str, int]:
        widths = {"hidden": self.embeddings(model).tok_embeddings.embedding_dim}
        for i, (layer, attention) in enumerate(zip(self.layers(model), self.attentions(model), strict=True)):
            widths[f"layer.{i}.ffn"] = layer.mlp.Wo.in_features
            widths[f"layer.{i}.heads"] = attention.Wo.in_features // attention.head_dim
            widths[f"layer.{i}.qk_dim"] = widths[f"layer.{i}.vo_dim"] = attention.head_dim
        return widths | self._classifier_widths(model)

    def _shared_uses(self, model: nn.Module) -> list[AxisUse]:
        embeddings = f"{self.backbone_name}.embeddings"
        uses = [AxisUse(f"{embeddings}.tok_embeddings.weight", 1, ("hidden",)), *_norm_uses(f"{embeddings}.norm")]
        uses += _norm_uses(f"{self.backbone_name}.final_norm")
        inner = CLASSIFIER_AXIS if self.has_classifier(model) else "hidden"
        uses += linear_uses("head.dense", out=(inner,), into=("hidden",))
        uses += [*_norm_uses("head.norm", inner), AxisUse("classifier.weight", 1, (inner,))]
        # Present only where it is not tied to the embeddings.
        return [*uses, AxisUse("decoder.weight", 1, ("hidden",))]

    def _layer_uses(self, i: int) -> list[AxisUse]:
        layer = f"{self.backbone_name}.{self.layers_name}.{i}"
        heads, ffn = f"layer.{i}.heads", (f"layer.{i}.ffn",)
        qk, vo = (heads, f"layer.{i}.qk_dim"), (heads, f"layer.{i}.vo_dim")
        uses = [*_norm_uses(f"{layer}.attn_norm"), *_norm_uses(f"{layer}.mlp_norm")]
        uses += _fused_uses(f"{layer}.attn.Wqkv", (qk, qk, vo))
        uses += linear_uses(f"{layer}.attn.Wo", out=("hidden",), into=vo)
        uses += _fused_uses(f"{layer}.mlp.Wi", (ffn, ffn))
        return uses + linear_uses(f"{layer}.mlp.Wo", out=("hidden",), into=ffn)

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        refresh_sizes(model, self.axis_table(model).with_widths(widths))
        model.config.hidden_size = widths["hidden"]

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        super().keep_layers(model, kept)
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
        for i, layer in enumerate(self.layers(model)):
            layer.layer_idx = layer.attn.layer_idx = i
        _leave_out_norm(self.layers(model)[0])

    def num_layer_kinds(self, model: nn.Module) -> int:
        norms = (type(layer.attn_norm) for layer in self.layers(model))
        return len(set(zip(model.config.layer_types, norms, strict=True)))

    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        if abs(ratio - 1) > 1e-6:
            raise ValueError(f"rotary heads keep their dims, and so their softmax scale; found a ratio of {ratio}")

    def embeddings(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).embeddings

    def softmax_scale(self, model: nn.Module) -> float:
        return self.attentions(model)[0].head_dim ** -0.5

    def window(self, config: PretrainedConfig) -> int | None:
        return config.local_attention // 2 if _SLIDING in config.layer_types else None

    def mask_kind(self, model: nn.Module, i: int) -> MaskKind:
        is_sliding = model.config.layer_types[i] == _SLIDING
        return MaskKind(window=self.window(model.config) if is_sliding else None)

    def attention_mask(
        self, config: PretrainedConfig, input_ids: Tensor, padding_mask: Tensor | None
    ) -> dict[str, Tensor | None]:
        """One mask for each kind of layer, bool, (B or 1, 1, T, T): of one mask the library would take no window."""
        full = super().attention_mask(config, input_ids, padding_mask)
        kind, num_tokens = MaskKind(window=self.window(config)), input_ids.shape[1]
        if kind.within(num_tokens) == (None, None):
            return {_FULL: full, _SLIDING: full}
        seen = kind.clear_hidden(torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=input_ids.device))
        if full is not None:  # a query of padding may see nothing else: itself, so that its softmax stays a number
            seen = seen & full | torch.eye(num_tokens, dtype=torch.bool, device=input_ids.device)
        return {_FULL: full, _SLIDING: seen}

    def layer_options(
        self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], padding_mask: Tensor | None
    ) -> Sequence[Mapping[str, Any]]:
        """The model's own rotary tensors, and the mask of each kind: the other model's layer may be of another one."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        masks = self.attention_mask(model.config, hidden[..., 0], padding_mask)
        rotary, kinds = self.backbone(model).rotary_emb, model.config.layer_types
        options = {
            kind: {"attention_mask": masks[kind], "position_embeddings": rotary(hidden, positions, kind)}
            for kind in set(kinds)
        }
        return [options[kind] for kind in kinds]

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        layer = self.layers(model)[-1]  # what makes its values makes queries and keys too
        return [layer.attn.Wo, layer.mlp_norm, layer.mlp]

    def final_norm(self, model: nn.Module) -> nn.LayerNorm:
        return self.backbone(model).final_norm

    def lm_head(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model.head, model.decoder)  # of the model's own modules

    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return model.head

    def decoder(self, model: nn.Module) -> nn.Linear:
        return model.decoder

    def blocks(self, model: nn.Module, i: int) -> tuple[Block, Block]:
        layer, norm = self.layers(model)[i], self.norm
        return (
            Block(norm(layer.attn_norm), (layer.attn.Wqkv,), layer.attn.Wo, None, None),
            Block(norm(layer.mlp_norm), (layer.mlp.Wi,), layer.mlp.Wo, None, None, inner=layer.mlp),
        )

    def embedding_norm(self, model: nn.Module) -> Norm:
        return self.norm(self.embeddings(model).norm)

    def head_parts(self, model: nn.Module) -> HeadParts:
        return HeadParts(model.head.dense, model.head.act, self.norm(model.head.norm))

    def classifier(self, model: nn.Module) -> Classifier:
        head, norm = model.head, self.norm(model.head.norm)
        pooling = None if self.labels_tokens(model) else model.config.classifier_pooling
        return Classifier(head.dense, head.act, norm, model.classifier, model.drop, False, pooling)

    def layer_norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        inside = self.backbone(model).named_modules()
        return {name: m for name, m in inside if isinstance(m, nn.LayerNorm) and name != "embeddings.norm"}

    def tensor_name(self, stored: str) -> str:
        """An encoder alone had no prefix."""
        return f"{self.backbone_name}.{stored}" if stored.startswith(_WITHOUT_HEAD) else stored


def _norm_uses(name: str, axis: str = "hidden") -> list[AxisUse]:
    return [AxisUse(f"{name}.{parameter}", 0, (axis,)) for parameter in ("weight", "bias")]


def _fused_uses(name: str, blocks: Sequence[tuple[str, ...]]) -> list[AxisUse]:
    """The uses of a linear of the residual stream whose outputs are `blocks`, one behind the other."""
    outputs = [
        AxisUse(f"{name}.{parameter}", 0, axes, block=i)
        for parameter in ("weight", "bias")
        for i, axes in enumerate(blocks)
    ]
    return [*outputs, AxisUse(f"{name}.weight", 1, ("hidden",))]


@torch.no_grad()
def _leave_out_norm(layer: nn.Module) -> None:
    """What the stock class wants of layer 0: the input has just been normalised, so the norm's gain goes into the
    linear behind it. Its shift goes along where that has a bias."""
    norm, linear = layer.attn_norm, layer.attn.Wqkv
    if isinstance(norm, nn.Identity):
        return
    if norm.bias is not None and linear.bias is not None:
        linear.bias.add_(linear.weight @ norm.bias)
    linear.weight.mul_(norm.weight)
    layer.attn_norm = nn.Identity()


MODERNBERT = ModernBertFamily(name="modernbert", model_types=("modernbert",))
