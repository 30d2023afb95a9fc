"""Causal language models with a norm before each residual block and rotary positions, as data.

The block of Llama (Touvron et al. 2023): x + o(heads(norm(x))), then x + down(act(gate(norm(x))) * up(norm(x))), with
grouped query heads (Ainslie et al. 2023). What the classes of this kind differ in (biases of the linears, norms of the
heads' queries and keys) is read off the model itself.

Rotary positions fix the dims of a head: a pair would have to be removed from all heads of all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import MistralConfig, PretrainedConfig

from homodistil.models.architecture import Architecture
from homodistil.models.axes import (
    AxisTable,
    AxisUse,
    Widths,
    layer_widths,
    linear_uses,
    num_layers,
    uniform_layer_widths,
)
from homodistil.models.family import ModelShape
from homodistil.models.module_sizes import refresh_sizes
from homodistil.models.named_family import NamedFamily

_NORMS = ("input_layernorm", "post_attention_layernorm")
_USE_NO_CACHE = {"use_cache": False}  # a cache would be filled anew in every step of training


@dataclass(frozen=True, kw_only=True)
class PreNormDecoder(NamedFamily):
    """A family of such models; the names of their parts are Llama's."""

    backbone_name: str = "model"
    layers_name: str = "layers"
    attention_name: str = "self_attn"
    head_prefix: str = "lm_head."
    dropout_fields: tuple[str, ...] = ("attention_dropout",)
    auto_class: str = "AutoModelForCausalLM"
    pipeline_tag: str = "text-generation"
    forward_options: Mapping[str, Any] = field(default_factory=lambda: dict(_USE_NO_CACHE))
    architecture: Architecture = Architecture(
        has_gated_mlp=True, has_head_transform=False, is_pre_norm=True, has_rotary_positions=True, is_causal=True
    )
    unused: tuple[str, ...] = ("lm_head.weight",)  # tied, in files that store it all the same

    def shape(self, config: PretrainedConfig) -> ModelShape:
        return ModelShape(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_tokens=min(config.max_position_embeddings, _window(config)),
        )

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        layer = layer_widths(widths, 0)
        values = teacher.to_dict() | {
            "hidden_size": widths["hidden"],
            "intermediate_size": layer.intermediate_size,
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.qk_dim,
            "num_hidden_layers": num_layers(widths),
        }
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][: num_layers(widths)]
        if type(teacher).model_type == "llama" and widths["hidden"] % layer.num_heads:
            return _as_mistral(values)
        return type(teacher)(**values)

    def stock_head_dim(self, widths: Widths) -> int | None:
        """The head size of the layers, if all are alike: these configurations have a field for it."""
        layer = uniform_layer_widths(widths)
        return None if layer is None else layer.qk_dim

    def axis_table(self, model: nn.Module) -> AxisTable:
        names = {name for name, _ in model.named_parameters()}
        uses = [use for i in range(len(self.layers(model))) for use in self._layer_uses(i)]
        uses = [*self._shared_uses(), *uses]
        return AxisTable(self._widths(model), tuple(use for use in uses if use.parameter in names))

    def _widths(self, model: nn.Module) -> dict[str, int]:
        # From what `refresh` keeps, not from the weights: under ZeRO-3 these are empty between uses.
        widths = {"hidden": self.embeddings(model).embedding_dim}
        for i, (layer, attention) in enumerate(zip(self.layers(model), self.attentions(model), strict=True)):
            widths[f"layer.{i}.ffn"] = layer.mlp.down_proj.in_features
            widths[f"layer.{i}.kv_heads"] = attention.k_proj.out_features // attention.head_dim
            widths[f"layer.{i}.heads_in_group"] = attention.num_key_value_groups
            widths[f"layer.{i}.qk_dim"] = widths[f"layer.{i}.vo_dim"] = attention.head_dim
        return widths

    def _shared_uses(self) -> list[AxisUse]:
        return [
            AxisUse(f"{self.backbone_name}.embed_tokens.weight", 1, ("hidden",)),
            AxisUse(f"{self.backbone_name}.norm.weight", 0, ("hidden",)),
            # Present only when it is not tied to the embeddings.
            AxisUse("lm_head.weight", 1, ("hidden",)),
        ]

    def _layer_uses(self, i: int) -> list[AxisUse]:
        layer, axis = f"{self.backbone_name}.{self.layers_name}.{i}", f"layer.{i}"
        groups, heads, ffn = f"{axis}.kv_heads", f"{axis}.heads_in_group", f"{axis}.ffn"
        query, key = (groups, heads, f"{axis}.qk_dim"), (groups, f"{axis}.qk_dim")
        context, value = (groups, heads, f"{axis}.vo_dim"), (groups, f"{axis}.vo_dim")
        attention = f"{layer}.{self.attention_name}"
        uses = [AxisUse(f"{layer}.{norm}.weight", 0, ("hidden",)) for norm in _NORMS]
        uses += linear_uses(f"{attention}.q_proj", out=query, into=("hidden",))
        uses += linear_uses(f"{attention}.k_proj", out=key, into=("hidden",))
        uses += linear_uses(f"{attention}.v_proj", out=value, into=("hidden",))
        uses += linear_uses(f"{attention}.o_proj", out=("hidden",), into=context)
        uses += linear_uses(f"{layer}.mlp.gate_proj", out=(ffn,), into=("hidden",))
        uses += linear_uses(f"{layer}.mlp.up_proj", out=(ffn,), into=("hidden",))
        return uses + linear_uses(f"{layer}.mlp.down_proj", out=("hidden",), into=(ffn,))

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        refresh_sizes(model, self.axis_table(model).with_widths(widths))
        for i, attention in enumerate(self.attentions(model)):
            attention.num_key_value_groups = widths[f"layer.{i}.heads_in_group"]
        model.config.hidden_size = widths["hidden"]

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        super().keep_layers(model, kept)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in kept]
        for i, attention in enumerate(self.attentions(model)):
            attention.layer_idx = i

    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        if abs(ratio - 1) > 1e-6:
            raise ValueError(f"rotary heads keep their dims, and so their softmax scale; found a ratio of {ratio}")

    def embeddings(self, model: nn.Module) -> nn.Embedding:
        return self.backbone(model).embed_tokens

    def layer_options(self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The model's own rotary tensors: another model's may have other frequencies."""
        rotary = self.backbone(model).rotary_emb
        return {"position_embeddings": rotary(hidden, position_ids=kwargs["position_ids"])}

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        layer = self.layers(model)[-1]
        values = [layer.self_attn.v_proj] if with_values else []
        return [*values, layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp]

    def final_norm(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).norm

    def lm_head(self, model: nn.Module) -> nn.Linear:
        return model.lm_head

    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return _unchanged

    def decoder(self, model: nn.Module) -> nn.Linear:
        return model.lm_head

    def layer_norms(self, model: nn.Module) -> dict[str, nn.Module]:
        norms = {f"{self.layers_name}.{i}.{n}": getattr(x, n) for i, x in enumerate(self.layers(model)) for n in _NORMS}
        return norms | {"norm": self.final_norm(model)}


def _window(config: PretrainedConfig) -> int:
    """Tokens within which every layer sees all earlier ones: up to there a sliding window hides nothing."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    return window if slides else config.max_position_embeddings


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _as_mistral(values: dict[str, Any]) -> PretrainedConfig:
    """A Llama whose hidden size is no multiple of its heads, which Llama's own class refuses and Mistral's does not.

    Without a sliding window the two compute the same.
    """
    dropped = ("model_type", "architectures", "mlp_bias", "pretraining_tp")
    return MistralConfig(**{k: v for k, v in values.items() if k not in dropped} | {"sliding_window": None})


def _unchanged(rows: Tensor) -> Tensor:
    return rows
