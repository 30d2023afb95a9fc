"""What causal language models have in common: how they are called and loaded, and a decoder without transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from homodistil.models.compensable import Compensable
from homodistil.models.named_family import NamedFamily

_USE_NO_CACHE = {"use_cache": False}  # a cache would be filled anew in every step of training


@dataclass(frozen=True, kw_only=True)
class CausalDecoder(NamedFamily, Compensable):
    """A family of such models."""

    head_prefix: str = "lm_head."
    auto_class: str = "AutoModelForCausalLM"
    pipeline_tag: str = "text-generation"
    forward_options: Mapping[str, Any] = field(default_factory=lambda: dict(_USE_NO_CACHE))
    unused: tuple[str, ...] = ("lm_head.weight",)  # tied, in files that store it all the same

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        super().keep_layers(model, kept)
        for i, attention in enumerate(self.attentions(model)):
            attention.layer_idx = i

    def embedding_norm(self, model: nn.Module) -> None:
        return None

    def lm_head(self, model: nn.Module) -> nn.Linear:
        return model.lm_head

    def lm_transform(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return _unchanged

    def decoder(self, model: nn.Module) -> nn.Linear:
        return model.lm_head


def _unchanged(rows: Tensor) -> Tensor:
    return rows
