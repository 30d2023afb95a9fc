"""Gemma (arXiv 2403.08295) and Gemma 3's text model (arXiv 2503.19786): Llama's block, except that norms multiply with
1 + weight and embeddings are multiplied with sqrt(hidden_size).

Gemma 3 has a norm behind each block too, norms of every head's queries and keys, which stay whole, and layers of two
kinds: those that see a window have rotary frequencies of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from homodistil.models.decoders.pre_norm import LLAMA_LIKE, PreNormDecoder
from homodistil.models.model_shape import RequiredValue

_SOFTCAPPING = "capped scores and logits are not computed here; give a model that was trained without (Gemma 3 was)"
_BIDIRECTIONAL = RequiredValue((False, None), "it then sees what it is to predict; give the causal language model")


@dataclass(frozen=True, kw_only=True)
class GemmaDecoder(PreNormDecoder):
    """What does not follow from the names of Gemma's parts."""

    gain_offset: float = 1.0

    @torch.no_grad()
    def fold_embedding_scale(self, stock: nn.Module, trained: nn.Module) -> None:
        """Into the embeddings; where the decoder shares them, the final norm takes it back."""
        embeddings, norm = self.embeddings(stock), self.final_norm(stock)
        ratio = self.embeddings(trained).scalar_embed_scale / embeddings.scalar_embed_scale
        if ratio == 1:
            return
        embeddings.weight.mul_(ratio)
        if self.decoder(stock).weight is embeddings.weight:
            norm.weight.copy_((1 + norm.weight) / ratio - 1)


@dataclass(frozen=True, kw_only=True)
class Gemma3Decoder(GemmaDecoder):
    """Layers of two kinds."""

    def layer_options(
        self, model: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], padding_mask: Tensor | None
    ) -> Sequence[Mapping[str, Any]]:
        """Rotary tensors of each layer's kind."""
        rotary, kinds = self.backbone(model).rotary_emb, model.config.layer_types
        tensors = {kind: rotary(hidden, position_ids=kwargs["position_ids"], layer_type=kind) for kind in {*kinds}}
        return [{"position_embeddings": tensors[kind]} for kind in kinds]


GEMMA = GemmaDecoder(
    name="gemma",
    model_types=("gemma",),
    architecture=LLAMA_LIKE._replace(scales_in_fp32=True),
    required_values={"use_bidirectional_attention": _BIDIRECTIONAL},
)
GEMMA3 = Gemma3Decoder(
    name="gemma3",
    model_types=("gemma3_text",),
    stream_norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    needs_multiple_of_heads=True,
    architecture=LLAMA_LIKE._replace(scales_in_fp32=True, norms_per_layer=4, has_head_norms=True),
    config_names={"hidden_act": "hidden_activation"},
    required_values={
        "final_logit_softcapping": RequiredValue((None,), _SOFTCAPPING),
        "attn_logit_softcapping": RequiredValue((None,), _SOFTCAPPING),
        "use_bidirectional_attention": _BIDIRECTIONAL,
    },
)
