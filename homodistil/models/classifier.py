"""The head of sequence classifiers and cross-encoders: hidden states of a text or pair -> one logit for each label.

    decoder(norm(activation(linear(row))))      for the row of the first token, or the mean over tokens

Every supported family's stock class computes this; `norm` is there in ModernBERT alone. The width between `linear` and
`decoder` is an axis of its own (`classifier`, models/axes.py), which stock configurations want as wide as the hidden
states. B texts, T tokens, D hidden size, C width between the linears, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from homodistil.models.axes import AxisUse, linear_uses
from homodistil.models.norms import Norm
from homodistil.models.sentence_head import PoolingMode, pooled

CLASSIFIER_CLASS, CLASSIFIER_TAG = "AutoModelForSequenceClassification", "text-classification"
"""The class that loads a checkpoint with such a head, and its pipeline tag on the hub."""
ARCHITECTURE_END = "ForSequenceClassification"
"""End of its name in `architectures` of config.json."""

CLASSIFIER_AXIS = "classifier"

LogitKind = Literal["categories", "values"]
"""What logits are. categories: one label holds, by their softmax; values: each is a score of its own."""


class ClassifierNames(NamedTuple):
    """Where the parts are, by dotted name."""

    linear: str
    activation: str | Callable[[Tensor], Tensor]
    """Name of a module, or a function."""
    decoder: str
    dropout: str
    drops_first: bool = False
    """Whether dropout also acts on what the linear reads."""


class Classifier(NamedTuple):
    """The parts of one model's head. Every computation is a call of these modules, as ZeRO-3 wants it."""

    linear: nn.Linear
    """D -> C."""
    activation: Callable[[Tensor], Tensor]
    norm: Norm | None
    decoder: nn.Linear
    """C -> L."""
    dropout: nn.Module
    """Acts in training mode alone."""
    drops_first: bool
    pooling: PoolingMode

    def logits(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) as the backbone puts it out, mask (B, T) 1 = token, 0 = padding -> fp32 (B, L)."""
        return self.logits_of(self.rows(hidden, attention_mask))

    def logits_of(self, rows: Tensor) -> Tensor:
        """`rows` -> fp32 (B, L)."""
        inner = self.inner(self.linear(self.dropout(rows) if self.drops_first else rows))
        logits = self.decoder(self.dropout(inner))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def rows(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """What the linear reads, (B, D) in the dtype of `hidden`."""
        return pooled(hidden, attention_mask, self.pooling).to(hidden.dtype)

    def inner(self, put_out: Tensor) -> Tensor:
        """What enters the decoder, (B, C), of what the linear has put out."""
        activated = self.activation(put_out)
        return activated if self.norm is None else self.norm.module(activated)


def classifier_of(names: ClassifierNames, model: nn.Module) -> Classifier:
    """The head of `model` of a family with LayerNorms after its blocks: that of the first token, without a norm."""
    is_name = isinstance(names.activation, str)
    activation = model.get_submodule(names.activation) if is_name else names.activation
    linear, decoder, dropout = (model.get_submodule(name) for name in (names.linear, names.decoder, names.dropout))
    return Classifier(linear, activation, None, decoder, dropout, names.drops_first, "cls")


def classifier_uses(names: ClassifierNames) -> list[AxisUse]:
    """The uses of such a head."""
    uses = linear_uses(names.linear, out=(CLASSIFIER_AXIS,), into=("hidden",))
    return [*uses, AxisUse(f"{names.decoder}.weight", 1, (CLASSIFIER_AXIS,))]


def logit_kind(config) -> LogitKind:
    """What the logits of a model with this Hugging Face configuration are, as its class trains them."""
    kinds = {None: "categories" if config.num_labels > 1 else "values", "single_label_classification": "categories"}
    return kinds.get(config.problem_type, "values")
