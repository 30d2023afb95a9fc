"""The part of a family's contract (family.py) that is about what a model has behind its backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PretrainedConfig,
)

from homodistil.models.classifier import OF_TEXTS, OF_TOKENS, Classifier, LabelClass, label_class

HeadKind = Literal["lm", "classifier", "none"]
"""What a model has behind its backbone: a language-modelling head, one of labels (classifier.py), or nothing."""

_LABEL_CLASSES = {
    OF_TEXTS: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    OF_TOKENS: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}


class FamilyHeads(ABC):
    """Which heads the models of a family may have."""

    @abstractmethod
    def empty_model(self, config: PretrainedConfig) -> nn.Module:
        """A freshly initialised model of this shape (put it on the meta device to look at shapes only)."""

    @abstractmethod
    def backbone(self, model: nn.Module) -> nn.Module:
        """Token ids -> last hidden states."""

    def empty(self, config: PretrainedConfig, head: HeadKind) -> nn.Module:
        """A freshly initialised model of this shape with a head of this kind; one of labels has them of tokens where
        the configuration names a token classifier."""
        if head == "classifier":
            return _LABEL_CLASSES[label_class(config)][type(config)](config)
        model = self.empty_model(config)
        if head == "none":
            self.drop_head(model)
        return model

    def head_kind(self, model: nn.Module) -> HeadKind:
        """What `model` has behind its backbone: an encoder may go without a head (`drop_head`)."""
        if any(_is_of(model, kind) for kind in _LABEL_CLASSES):
            return "classifier"
        backbone = self.backbone(model)
        return "lm" if any(child is not backbone for child in model.children()) else "none"

    def has_head(self, model: nn.Module) -> bool:
        """Whether `model` has a language-modelling head."""
        return self.head_kind(model) == "lm"

    def has_classifier(self, model: nn.Module) -> bool:
        """Whether `model` has a head of labels (`classifier`)."""
        return self.head_kind(model) == "classifier"

    def labels_tokens(self, model: nn.Module) -> bool:
        """Whether `model` is a token classifier."""
        return _is_of(model, OF_TOKENS)

    has_classifiers: bool = False
    """Whether the parts of such heads are known (`classifier`)."""

    def classifier(self, model: nn.Module) -> Classifier:
        """The head of a sequence or token classifier of a family that `has_classifiers`."""
        raise NotImplementedError

    def drop_head(self, model: nn.Module) -> None:
        """Leave out everything but the backbone, in place: the methods about the head may not be called any more."""
        backbone = self.backbone(model)
        for name, child in list(model.named_children()):
            if child is not backbone:
                delattr(model, name)


def _is_of(model: nn.Module, kind: LabelClass) -> bool:
    return isinstance(model, _LABEL_CLASSES[kind].get(type(model.config), ()))
