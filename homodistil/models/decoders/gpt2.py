"""GPT-2 (Radford et al. 2019): LayerNorm before each block, learned positions, queries, keys and values in one matrix.

Its linears are Conv1D modules, whose weights are (in, out). The class needs hidden_size = heads x dims of a head, as
BERT's does, so heads that are narrower on the way are padded in an export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.architecture import Architecture
from homodistil.models.axes import AxisUse, Widths, layer_widths, num_layers, uniform_layer_widths
from homodistil.models.compensable import Block
from homodistil.models.decoders.causal import CausalDecoder
from homodistil.models.model_shape import ModelShape, RequiredValue
from homodistil.models.module_sizes import refresh_sizes

_NORMS = ("ln_1", "ln_2")
_SCALE = "the softmax scale of every layer has to be that of its heads; give a model that was trained so"


@dataclass(frozen=True, kw_only=True)
class GPT2Decoder(CausalDecoder):
    """GPT-2 and the models of its class (DistilGPT2)."""

    architecture: Architecture = Architecture(
        has_head_transform=False, is_pre_norm=True, is_causal=True, has_fused_qkv=True, activation_tensors=4
    )

    def shape(self, config: PretrainedConfig) -> ModelShape:
        return ModelShape(
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
            intermediate_size=config.n_inner if config.n_inner is not None else 4 * config.n_embd,
            vocab_size=config.vocab_size,
            max_tokens=config.n_positions,
        )

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        layer = layer_widths(widths, 0)
        sizes = {"n_embd": widths["hidden"], "n_inner": layer.intermediate_size, "n_head": layer.num_heads}
        return type(teacher)(**teacher.to_dict() | sizes | {"n_layer": num_layers(widths)})

    def stock_head_dim(self, widths: Widths) -> int | None:
        """hidden_size = heads x head size in every layer, and one size for all layers; narrower heads are padded."""
        layer = uniform_layer_widths(widths)
        if layer is None or widths["hidden"] % layer.num_heads:
            return None
        head_dim = widths["hidden"] // layer.num_heads
        return head_dim if head_dim >= layer.qk_dim else None

    def _widths(self, model: nn.Module) -> dict[str, int]:
        widths = {"hidden": self.backbone(model).wte.embedding_dim}
        for i, (layer, attention) in enumerate(zip(self.layers(model), self.attentions(model), strict=True)):
            widths[f"layer.{i}.ffn"] = layer.mlp.c_fc.nf
            widths[f"layer.{i}.heads"] = attention.num_heads
            widths[f"layer.{i}.qk_dim"] = widths[f"layer.{i}.vo_dim"] = attention.head_dim
        return widths

    def _shared_uses(self, model: nn.Module) -> list[AxisUse]:
        uses = [AxisUse(f"{self.backbone_name}.{table}.weight", 1, ("hidden",)) for table in ("wte", "wpe")]
        # The decoder is a parameter only where it is not tied to the embeddings.
        return [*uses, *_vector(f"{self.backbone_name}.ln_f"), AxisUse("lm_head.weight", 1, ("hidden",))]

    def _layer_uses(self, i: int) -> list[AxisUse]:
        layer, axis = f"{self.backbone_name}.{self.layers_name}.{i}", f"layer.{i}"
        qk, vo = ((f"{axis}.heads", f"{axis}.{kind}") for kind in ("qk_dim", "vo_dim"))
        uses = [use for norm in _NORMS for use in _vector(f"{layer}.{norm}")]
        uses += _conv_uses(f"{layer}.attn.c_attn", out=[qk, qk, vo], into=("hidden",))
        uses += _conv_uses(f"{layer}.attn.c_proj", out=[("hidden",)], into=vo)
        uses += _conv_uses(f"{layer}.mlp.c_fc", out=[(f"{axis}.ffn",)], into=("hidden",))
        return uses + _conv_uses(f"{layer}.mlp.c_proj", out=[("hidden",)], into=(f"{axis}.ffn",))

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        refresh_sizes(model, self.axis_table(model).with_widths(widths))
        for i, attention in enumerate(self.attentions(model)):
            layer = layer_widths(widths, i)
            attention.num_heads, attention.head_dim = layer.num_heads, layer.qk_dim
            attention.split_size = layer.num_heads * layer.qk_dim
        model.config.n_embd = widths["hidden"]

    @torch.no_grad()
    def fold_softmax_scale(self, model: nn.Module, ratio: float) -> None:
        for attention in self.attentions(model):
            attention.c_attn.weight[:, : attention.split_size].mul_(ratio)
            attention.c_attn.bias[: attention.split_size].mul_(ratio)

    def embeddings(self, model: nn.Module) -> nn.Module:
        """Dropout: the sum of both tables is made in the model's own forward."""
        return self.backbone(model).drop

    def embed(self, model: nn.Module, input_ids: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        backbone = self.backbone(model)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return backbone.drop(backbone.wte(input_ids) + backbone.wpe(positions[None]))

    def output_modules(self, model: nn.Module, with_values: bool) -> list[nn.Module]:
        """Without what makes the values: that makes queries and keys too."""
        layer = self.layers(model)[-1]
        return [layer.attn.c_proj, layer.ln_2, layer.mlp]

    def blocks(self, model: nn.Module, i: int) -> tuple[Block, Block]:
        layer, norm = self.layers(model)[i], self.norm
        return (
            Block(norm(layer.ln_1), (layer.attn.c_attn,), layer.attn.c_proj, None, None),
            Block(norm(layer.ln_2), (layer.mlp.c_fc,), layer.mlp.c_proj, None, None, inner=layer.mlp),
        )

    def final_norm(self, model: nn.Module) -> nn.LayerNorm:
        return self.backbone(model).ln_f

    def layer_norms(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = enumerate(self.layers(model))
        norms = {f"{self.layers_name}.{i}.{name}": getattr(layer, name) for i, layer in layers for name in _NORMS}
        return norms | {"ln_f": self.final_norm(model)}

    def tensor_name(self, stored: str) -> str:
        """The first checkpoints are of the backbone alone."""
        is_backbone_alone = stored.startswith(("wte.", "wpe.", "h.", "ln_f."))
        return f"{self.backbone_name}.{stored}" if is_backbone_alone else stored

    def is_unused(self, name: str) -> bool:
        """Causal masks, which older checkpoints kept, too."""
        return super().is_unused(name) or re.search(r"\.attn\.(masked_)?bias$", name) is not None


def _conv_uses(name: str, out: list[tuple[str, ...]], into: tuple[str, ...]) -> list[AxisUse]:
    """The uses of a Conv1D called `name`: weight (in, out) and bias (out,). `out`: axes of each block."""
    uses = [AxisUse(f"{name}.weight", 0, into)]
    for block, axes in enumerate(out):
        uses += [AxisUse(f"{name}.weight", 1, axes, block=block), AxisUse(f"{name}.bias", 0, axes, block=block)]
    return uses


def _vector(name: str) -> list[AxisUse]:
    return [AxisUse(f"{name}.weight", 0, ("hidden",)), AxisUse(f"{name}.bias", 0, ("hidden",))]


GPT2 = GPT2Decoder(
    name="gpt2",
    model_types=("gpt2",),
    backbone_name="transformer",
    layers_name="h",
    attention_name="attn",
    dropout_fields=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    config_names={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    required_values={
        "scale_attn_weights": RequiredValue((True,), _SCALE),
        "scale_attn_by_inverse_layer_idx": RequiredValue((False,), _SCALE),
    },
)
