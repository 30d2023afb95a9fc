"""Causal language models with a norm before each residual block and rotary positions, as data.

The block of Llama (Touvron et al. 2023): x + o(heads(norm(x))), then x + down(act(gate(norm(x))) * up(norm(x))), with
grouped query heads (Ainslie et al. 2023). What the classes of this kind differ in (biases of the linears, norms of the
heads' queries and keys) is read off the model itself.

Rotary positions turn the dims of a head in pairs: a pair goes from all heads of all layers at once, and what is left at
the end is a progression of them (models/rotary_pairs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PretrainedConfig

from homodistil.models.architecture import Architecture
from homodistil.models.axes import (
    AxisUse,
    Keep,
    Widths,
    layer_widths,
    linear_uses,
    num_layers,
    uniform_layer_widths,
)
from homodistil.models.compensable import Block
from homodistil.models.decoders.causal import CausalDecoder
from homodistil.models.model_shape import ModelShape
from homodistil.models.module_sizes import refresh_sizes
from homodistil.models.norms import Norm
from homodistil.models.rotary_pairs import kept_pairs, progression_of, stock_rotary

_BY_LAYER = ("layer_types", "no_rope_layers")
"""Fields of a configuration that are lists with one entry for each layer."""
LLAMA_LIKE = Architecture(
    has_gated_mlp=True,
    has_head_transform=False,
    is_pre_norm=True,
    has_rotary_positions=True,
    is_causal=True,
    has_rms_norm=True,
)


@dataclass(frozen=True, kw_only=True)
class PreNormDecoder(CausalDecoder):
    """A family of such models; the names of their parts are Llama's."""

    backbone_name: str = "model"
    layers_name: str = "layers"
    attention_name: str = "self_attn"
    dropout_fields: tuple[str, ...] = ("attention_dropout",)
    architecture: Architecture = LLAMA_LIKE
    stream_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms of a layer that read the residual stream, the first one before the queries."""
    output_norms: tuple[str, ...] = ()
    """Norms of what a block puts out, before the sum."""
    needs_multiple_of_heads: bool = False
    """The configuration refuses a hidden size that is no multiple of the query heads."""
    narrows_heads: bool = False
    """Whether heads may lose rotary pairs: one table of angles, and nothing else that knows the dims of a head."""

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
        values |= {name: values[name][: num_layers(widths)] for name in _BY_LAYER if values.get(name)}
        if type(teacher).model_type == "llama" and widths["hidden"] % layer.num_heads:
            return _as_mistral(values)
        return type(teacher)(**values)

    def set_layer_kinds(self, config: PretrainedConfig, model_config: PretrainedConfig) -> None:
        for name in _BY_LAYER:
            if getattr(config, name, None):
                setattr(config, name, [*getattr(model_config, name)])

    def stock_head_dim(self, widths: Widths) -> int | None:
        """The head size of the layers, if all are alike: these configurations have a field for it."""
        layer = uniform_layer_widths(widths)
        if layer is None or (self.needs_multiple_of_heads and widths["hidden"] % layer.num_heads):
            return None
        return layer.qk_dim

    def head_dim_obstacle(self, config: PretrainedConfig) -> str | None:
        if not self.narrows_heads:
            return f"heads of the {self.name} family cannot get narrower here"
        if not all(getattr(config, "no_rope_layers", None) or [1]):
            return f"some layers of this {config.model_type} have no positions, and heads that mix cannot get narrower"
        rope = config.rope_parameters
        if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1:
            return (
                f"only rotary positions of rope_type default, of all dims of a head, can lose pairs, and this teacher "
                f"has {rope}"
            )
        return None

    def _widths(self, model: nn.Module) -> dict[str, int]:
        widths = {"hidden": self.embeddings(model).embedding_dim}
        for i, (layer, attention) in enumerate(zip(self.layers(model), self.attentions(model), strict=True)):
            widths[f"layer.{i}.ffn"] = layer.mlp.down_proj.in_features
            widths[f"layer.{i}.kv_heads"] = attention.k_proj.out_features // attention.head_dim
            widths[f"layer.{i}.heads_in_group"] = attention.num_key_value_groups
            widths[f"layer.{i}.qk_dim"] = widths[f"layer.{i}.vo_dim"] = attention.head_dim
        if self.narrows_heads and self.architecture.has_head_norms:
            widths["head_norm"] = self.attentions(model)[0].head_dim
        return widths

    def _shared_uses(self, model: nn.Module) -> list[AxisUse]:
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
        uses = [AxisUse(f"{layer}.{norm}.weight", 0, ("hidden",)) for norm in self.stream_norms + self.output_norms]
        uses += linear_uses(f"{attention}.q_proj", out=query, into=("hidden",))
        uses += linear_uses(f"{attention}.k_proj", out=key, into=("hidden",))
        uses += linear_uses(f"{attention}.v_proj", out=value, into=("hidden",))
        uses += linear_uses(f"{attention}.o_proj", out=("hidden",), into=context)
        if self.narrows_heads:
            uses += [AxisUse(f"{attention}.{norm}.weight", 0, ("head_norm",)) for norm in ("q_norm", "k_norm")]
        uses += linear_uses(f"{layer}.mlp.gate_proj", out=(ffn,), into=("hidden",))
        uses += linear_uses(f"{layer}.mlp.up_proj", out=(ffn,), into=("hidden",))
        return uses + linear_uses(f"{layer}.mlp.down_proj", out=("hidden",), into=(ffn,))

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        refresh_sizes(model, self.axis_table(model).with_widths(widths))
        for i, attention in enumerate(self.attentions(model)):
            attention.num_key_value_groups = widths[f"layer.{i}.heads_in_group"]
            attention.head_dim = widths[f"layer.{i}.qk_dim"]
        model.config.hidden_size = widths["hidden"]

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        super().keep_layers(model, kept)
        for name in _BY_LAYER:
            if values := getattr(model.config, name, None):
                setattr(model.config, name, [values[i] for i in kept])

    def follow_origins(self, model: nn.Module, origins: Keep) -> None:
        """Angles of the pairs that are left."""
        pairs = kept_pairs(origins) if self.narrows_heads else None
        if pairs is not None:
            rotary = self.backbone(model).rotary_emb
            rotary.inv_freq = rotary.original_inv_freq[pairs.to(rotary.original_inv_freq.device)]

    def set_positions(self, config: PretrainedConfig, model: nn.Module, origins: Keep) -> None:
        if not self.narrows_heads:
            return
        pairs, num_pairs = kept_pairs(origins), len(self.backbone(model).rotary_emb.original_inv_freq)
        if pairs is not None and len(pairs) < num_pairs:
            theta = model.config.rope_parameters["rope_theta"]
            config.rope_parameters = stock_rotary(progression_of(pairs), num_pairs, theta)

    @torch.no_grad()
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        """Into the norm of the queries, which would undo it in front of it, or else into what makes them."""
        if abs(ratio - 1) <= 1e-6:
            return
        if not self.narrows_heads:
            raise ValueError(f"heads of {self.name} keep their dims, and so their softmax scale; found {ratio}")
        for attention in self.attentions(model):
            for parameter in getattr(attention, "q_norm", attention.q_proj).parameters():
                parameter.mul_(ratio)

    def embeddings(self, model: nn.Module) -> nn.Embedding:
        return self.backbone(model).embed_tokens

    def layer_options(
        self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], padding_mask: Tensor | None
    ) -> Sequence[Mapping[str, Any]]:
        """The model's own rotary tensors: another model's may have other frequencies."""
        rotary = self.backbone(model).rotary_emb(hidden, position_ids=kwargs["position_ids"])
        return [{"position_embeddings": rotary}] * len(self.layers(model))

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        layer = self.layers(model)[-1]
        values = [layer.self_attn.v_proj] if with_values else []
        norms = [layer.get_submodule(name) for name in self.stream_norms[1:] + self.output_norms]
        return [*values, layer.self_attn.o_proj, *norms, layer.mlp]

    def blocks(self, model: nn.Module, i: int) -> tuple[Block, Block]:
        layer = self.layers(model)[i]
        attention, mlp = layer.self_attn, layer.mlp
        reads, puts_out = self._norms(layer, self.stream_norms), self._norms(layer, self.output_norms)
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        return (
            Block(reads[0], qkv, attention.o_proj, puts_out[0], None),
            Block(reads[1], (mlp.gate_proj, mlp.up_proj), mlp.down_proj, puts_out[1], None, inner=mlp),
        )

    def _norms(self, layer: nn.Module, names: Sequence[str]) -> list[Norm | None]:
        """One for each block."""
        return [self.norm(layer.get_submodule(name)) for name in names] or [None, None]

    def final_norm(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).norm

    def layer_norms(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = enumerate(self.layers(model))
        norms = {f"{self.layers_name}.{i}.{n}": getattr(layer, n) for i, layer in layers for n in self.stream_norms}
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
