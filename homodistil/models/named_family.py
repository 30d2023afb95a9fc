"""What of a family follows from the dotted names of its parts alone."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig

from homodistil.models.axes import AxisTable, AxisUse
from homodistil.models.classifier import CLASSIFIER_AXIS
from homodistil.models.family import ModelFamily
from homodistil.models.model_shape import RequiredValue

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
    head_prefix: str | tuple[str, ...]
    """Parameters that begin with this belong to the language-modelling head alone."""
    dropout_fields: tuple[str, ...]
    config_names: Mapping[str, str] = field(default_factory=dict)
    required_values: Mapping[str, RequiredValue] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    """Beginnings of names of stored tensors that the language model has no use for."""

    @abstractmethod
    def _widths(self, model: nn.Module) -> dict[str, int]:
        """Axis -> width, from what `refresh` keeps, not from the weights: under ZeRO-3 these are empty between uses."""

    @abstractmethod
    def _shared_uses(self, model: nn.Module) -> list[AxisUse]:
        """Uses of what is outside the layers. Parameters that a model lacks (biases, a tied decoder) may be named."""

    @abstractmethod
    def _layer_uses(self, i: int) -> list[AxisUse]:
        """Uses of layer `i`, likewise."""

    def _classifier_widths(self, model: nn.Module) -> dict[str, int]:
        """The axis of a head of labels, where `model` has one with two linears."""
        linear = self.classifier(model).linear if self.has_classifier(model) else None
        return {} if linear is None else {CLASSIFIER_AXIS: linear.out_features}

    def axis_table(self, model: nn.Module) -> AxisTable:
        names = {name for name, _ in model.named_parameters()}
        of_layers = [use for i in range(len(self.layers(model))) for use in self._layer_uses(i)]
        uses = [*self._shared_uses(model), *of_layers]
        return AxisTable(self._widths(model), tuple(use for use in uses if use.parameter in names))

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        for name in self.dropout_fields:
            setattr(config, name, probability)

    def empty_model(self, config: PretrainedConfig) -> nn.Module:
        return _CLASSES[self.auto_class][type(config)](config)

    def keep_layers(self, model: nn.Module, kept: Sequence[int]) -> None:
        layers = self.layers(model)
        for i in reversed(range(len(layers))):
            if i not in kept:
                del layers[i]  # the list renumbers the others
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
