"""Taps: what distillation compares (embeddings, layer outputs, Q and K), read from a stock Hugging Face model.

Q and K come through the library's registry of attention functions, so SDPA / flash keeps computing the output and no
attention matrix is made here; layer outputs come through module hooks. No modelling code of our own.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "homodistil_sdpa"
"""Value for `attn_implementation`: SDPA that shows its queries and keys to the taps."""


class Tapped(NamedTuple):
    """One forward pass. B batch, T tokens, D hidden, N heads, H dims of a head."""

    embedding: Tensor
    """What entered layer 0, (B, T, D)."""
    layers: list[Tensor]
    """Output of every layer, (B, T, D)."""
    queries: list[Tensor]
    """(B, N, T, H) a layer."""
    keys: list[Tensor]
    """(B, N, T, H) a layer."""
    scale: float
    """What the softmax multiplies q.k with."""

    @property
    def last(self) -> Tensor:
        return self.layers[-1]


class Taps:
    """Hooks on one model. `run` is the model's backbone forward and returns what passed by.

    `scale` is what the model's softmax multiplies q.k with.
    """

    def __init__(self, model: nn.Module, family: ModuleType) -> None:
        self._backbone = family.backbone(model)
        self._seen: dict[str, list[Tensor]] = {}
        self.scale = float(family.attentions(model)[0].scaling)
        self._listen(family.embeddings(model), "embedding")
        for layer in family.layers(model):
            self._listen(layer, "layers")
        for attention in family.attentions(model):
            attention.homodistil_taps = self

    def _listen(self, module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: self.record(name, output))

    def record(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self._seen.setdefault(name, []).append(tensor)

    def run(self, input_ids: Tensor, attention_mask: Tensor) -> Tapped:
        """input_ids and attention_mask: int64, (B, T); mask 1 = token, 0 = padding."""
        self._seen = {}
        self._backbone(input_ids=input_ids, attention_mask=attention_mask)
        # Handed over, not kept: a graph that outlives its step would hold memory and old parameter shapes.
        seen, self._seen = self._seen, {}
        return Tapped(seen["embedding"][0], seen["layers"], seen["queries"], seen["keys"], self.scale)


def _tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    taps = getattr(module, "homodistil_taps", None)
    if taps is not None:
        taps.record("queries", query)
        taps.record("keys", key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _tapped_attention)
# Without its own entry here the library would build no padding mask for the new name.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
