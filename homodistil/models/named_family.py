"""What of a family follows from the dotted names of its parts alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig

from homodistil.models.family import ModelFamily

_CLASSES = {"AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING}


@dataclass(frozen=True, kw_only=True)
class NamedFamily(ModelFamily):
    """A family whose models differ from each other in sizes alone."""

    name: str
    model_types: tuple[str, ...]
    backbone_name: str
    layers_name: str
    """Inside the backbone."""
    attention_name: str
    """Inside a layer: the module that calls the library's attention function."""
    head_prefix: str
    """Parameters that begin with this belong to the language-modelling head alone."""
    dropout_fields: tuple[str, ...]
    """Fields of the configuration that are dropout probabilities."""
    unused: tuple[str, ...] = ()
    """Beginnings of names of stored tensors that the language model has no use for."""

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        for field in self.dropout_fields:
            setattr(config, field, probability)

    def empty_model(self, config: PretrainedConfig) -> nn.Module:
        return _CLASSES[self.auto_class][type(config)](config)

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        holder, _, name = self.layers_name.rpartition(".")
        parent = self.backbone(model).get_submodule(holder) if holder else self.backbone(model)
        setattr(parent, name, nn.ModuleList(self.layers(model)[i] for i in kept))
        model.config.num_hidden_layers = len(kept)

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.backbone_name)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return self.backbone(model).get_submodule(self.layers_name)

    def attentions(self, model: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule(self.attention_name) for layer in self.layers(model)]

    def tensor_name(self, stored: str) -> str:
        return stored

    def is_head(self, name: str) -> bool:
        return name.startswith(self.head_prefix)

    def is_unused(self, name: str) -> bool:
        return name.startswith(self.unused)

    def num_stored_layers(self, names: Iterable[str]) -> int:
        pattern = re.compile(rf"{re.escape(f'{self.backbone_name}.{self.layers_name}')}\.(\d+)\.")
        matches = [pattern.match(self.tensor_name(name)) for name in names]
        return 1 + max((int(match[1]) for match in matches if match), default=-1)
