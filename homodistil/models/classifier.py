"""Heads of labels: hidden states -> one logit for each label, of a text or pair, or of every token.

    decoder(norm(activation(linear(row))))      for the row of the first token, or the mean over tokens
    decoder(row)                                for the row of every token, in token classifiers

The stock classes of every supported family compute this, but for ModernBERT's: it alone has a `norm`, and its token
classifiers have all of the first form. The width between `linear` and `decoder` is an axis of its own (`classifier`,
models/axes.py), which stock configurations want as wide as the hidden states. B texts, T tokens, R rows (a text each,
or a token), D hidden size, C width between the linears, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from homodistil.models.axes import AxisUse, linear_uses
from homodistil.models.norms import Norm
from homodistil.models.sentence_head import PoolingMode, pooled


class LabelClass(NamedTuple):
    """A class of models with a head of labels."""

    architecture_end: str
    """End of its name in `architectures` of config.json."""
    auto_class: str
    """What loads a checkpoint of it."""
    pipeline_tag: str
    """On the hub."""

    def named_by(self, config) -> bool:
        """Whether this Hugging Face configuration names it."""
        return any(name.endswith(self.architecture_end) for name in config.architectures or [])


OF_TEXTS = LabelClass("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification")
OF_TOKENS = LabelClass("ForTokenClassification", "AutoModelForTokenClassification", "token-classification")


def label_class(config) -> LabelClass:
    """That of a model with a head of labels and this Hugging Face configuration."""
    return OF_TOKENS if OF_TOKENS.named_by(config) else OF_TEXTS


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


class LabelledTexts(Protocol):
    """What such a head asks of a batch of texts (data/batch.py)."""

    attention_mask: Tensor
    """(B, T), 1 = token, 0 = padding."""
    target_index: Tensor
    """(R,) int64, flat positions b * T + t of the tokens that have labels, ascending; of token classifiers alone."""


class Classifier(NamedTuple):
    """The parts of one model's head. Every computation is a call of these modules, as ZeRO-3 wants it."""

    linear: nn.Linear | None
    """D -> C. None: the decoder reads the rows as they are, and C is D."""
    activation: Callable[[Tensor], Tensor] | None
    """None where there is no linear."""
    norm: Norm | None
    decoder: nn.Linear
    """C -> L."""
    dropout: nn.Module
    """Acts in training mode alone."""
    drops_first: bool
    pooling: PoolingMode | None
    """How a text becomes one row. None: each of its tokens is one."""

    @property
    def reader(self) -> nn.Linear:
        """The linear that reads the rows."""
        return self.decoder if self.linear is None else self.linear

    def logits(self, hidden: Tensor, texts: LabelledTexts) -> Tensor:
        """(B, T, D) as the backbone puts it out -> fp32 (R, L)."""
        return self.logits_of(self.rows(hidden, texts))

    def logits_of(self, rows: Tensor) -> Tensor:
        """`rows` -> fp32 (R, L)."""
        inner = self.inner(self.put_out(self.dropout(rows) if self.drops_first else rows))
        logits = self.decoder(self.dropout(inner))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def rows(self, hidden: Tensor, texts: LabelledTexts) -> Tensor:
        """What `reader` reads, (R, D) in the dtype of `hidden`."""
        if self.pooling is None:
            return hidden.flatten(0, 1).index_select(0, texts.target_index)
        return pooled(hidden, texts.attention_mask, self.pooling).to(hidden.dtype)

    def put_out(self, rows: Tensor) -> Tensor:
        """What the linear makes of `rows`, (R, C)."""
        return rows if self.linear is None else self.linear(rows)

    def inner(self, put_out: Tensor) -> Tensor:
        """What enters the decoder, (R, C), of what the linear has put out."""
        activated = put_out if self.activation is None else self.activation(put_out)
        return activated if self.norm is None else self.norm.module(activated)


def classifier_of(names: ClassifierNames, model: nn.Module) -> Classifier:
    """The head of `model` of a family with LayerNorms after its blocks: that of the first token, without a norm."""
    is_name = isinstance(names.activation, str)
    activation = model.get_submodule(names.activation) if is_name else names.activation
    linear, decoder, dropout = (model.get_submodule(name) for name in (names.linear, names.decoder, names.dropout))
    return Classifier(linear, activation, None, decoder, dropout, names.drops_first, "cls")


_TOKEN_DECODER, _TOKEN_DROPOUT = "classifier", "dropout"
"""Names in the token classifiers of these families: all have the same."""


def token_classifier_of(model: nn.Module) -> Classifier:
    """The head of a token classifier of such a family: one linear."""
    decoder, dropout = (model.get_submodule(name) for name in (_TOKEN_DECODER, _TOKEN_DROPOUT))
    return Classifier(None, None, None, decoder, dropout, drops_first=False, pooling=None)


def token_classifier_uses() -> list[AxisUse]:
    """The uses of such a head."""
    return [AxisUse(f"{_TOKEN_DECODER}.weight", 1, ("hidden",))]


def classifier_uses(names: ClassifierNames) -> list[AxisUse]:
    """The uses of such a head."""
    uses = linear_uses(names.linear, out=(CLASSIFIER_AXIS,), into=("hidden",))
    return [*uses, AxisUse(f"{names.decoder}.weight", 1, (CLASSIFIER_AXIS,))]


NO_LABEL = -100
"""Number of a label that is not there, which torch's cross-entropy passes over."""
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""Hugging Face's names of what labels are: one of several holds; each holds or not; scores."""


def problem_type(config) -> ProblemType:
    """What the labels of a model with this Hugging Face configuration are, which says what loss its class takes.

    Where the configuration leaves it open, stock classes also look at the labels themselves; here one label is a score,
    and of several one holds.
    """
    return config.problem_type or ("single_label_classification" if config.num_labels > 1 else "regression")


def logit_kind(config) -> LogitKind:
    """What the logits of a model with this Hugging Face configuration are, as its class trains them."""
    return "categories" if problem_type(config) == "single_label_classification" else "values"
