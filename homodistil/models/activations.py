"""Activation hooks: what distillation compares (embeddings, layer outputs, Q, K and V), read from a stock Hugging Face
model.

Q, K and V come through the library's registry of attention functions, so SDPA / flash keeps computing the output and no
attention matrix is made here; layer outputs come through module hooks. No modelling code of our own.

What passes by is shown to an `ActivationVisitor` at once, so that it can be used and freed while the forward pass goes
on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from homodistil.models.attention import attend
from homodistil.models.backbone import backbone_arguments
from homodistil.models.family import ModelFamily

ATTENTION = "homodistil_sdpa"
"""Value for `attn_implementation`: SDPA that shows its queries and keys to the taps, and values where wanted."""


def attention_implementation(family: ModelFamily) -> str:
    """The `attn_implementation` of a model whose activations are to be seen."""
    return ATTENTION if family.calls_attention_functions else "eager"


class LayerActivations(NamedTuple):
    """One layer. B batch, T tokens, D hidden, N heads, H dims of a head."""

    hidden: Tensor
    """Its output, (B, T, D)."""
    queries: Tensor
    """(B, N, T, H)."""
    keys: Tensor
    """(B, G, T, H): G = N, or fewer where query heads share keys and values."""
    values: Tensor | None = None
    """(B, G, T, H) of a layer that `show_values` was called for. Elsewhere they are not held on to."""


class Activations(NamedTuple):
    """One whole forward pass."""

    embedding: Tensor
    """What entered layer 0, (B, T, D)."""
    layers: list[Tensor]
    """Output of every layer, (B, T, D)."""
    queries: list[Tensor]
    """(B, N, T, H) per layer."""
    keys: list[Tensor]
    """(B, G, T, H) per layer."""
    last: Tensor
    """What the backbone puts out, (B, T, D): the last layer's output, or what a final norm makes of it."""
    scale: float
    """What the softmax multiplies q.k with."""
    relations: LayerActivations | None = None
    """Activations of the layer that shows its values."""


class ActivationVisitor:
    """What may be done while a forward pass goes by. `args` and `kwargs` are those of the module about to run."""

    def before_embedding(self, args: tuple, kwargs: dict) -> None:
        """Nothing by default."""

    def embedding(self, output: Tensor) -> None:
        """What enters layer 0, (B, T, D)."""

    def before_layer(self, i: int, args: tuple, kwargs: dict) -> None:
        """Nothing by default."""

    def layer(self, i: int, tap: LayerActivations) -> None:
        """Layer `i` is done."""


def show_values(model: nn.Module, family: ModelFamily, i: int) -> None:
    """From now on taps on `model`, those of copies too, also see the values of layer `i` (negative: from the last)."""
    family.attentions(model)[i].homodistil_shows_values = True


def shows_values(attention: nn.Module) -> bool:
    """Whether `show_values` was called for the layer of this attention module."""
    return getattr(attention, "homodistil_shows_values", False)


class ActivationHooks:
    """Hooks on one model, silent unless `visit` or `run` is under way.

    `scale` is what the model's softmax multiplies q.k with.
    """

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        self._backbone, self._family, self._config = family.backbone(model), family, model.config
        self._visitor: ActivationVisitor | None = None
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.scale = family.softmax_scale(model)
        family.embedding_entry(model).register_forward_pre_hook(self._before_embedding, with_kwargs=True)
        family.embeddings(model).register_forward_hook(self._after_embedding)
        self.number_layers(model)
        for layer in family.layers(model):
            # No closures: a copy of the model is to have hooks of its own.
            layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            layer.register_forward_hook(self._after_layer)
        family.tap_attention(model, self.record)

    def number_layers(self, model: nn.Module) -> None:
        """Call it again once layers of `model` have left: the others are shown by their new numbers."""
        for i, layer in enumerate(self._family.layers(model)):
            layer.homodistil_number = i

    def visit(
        self,
        input_ids: Tensor,
        padding_mask: Tensor | None,
        visitor: ActivationVisitor,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """The model's backbone forward, shown to `visitor`. Returns what it puts out, (B, T, D).

        input_ids, padding_mask and token_types: int64, (B, T); mask 1 = token, 0 = padding, None: no padding, and no
        types (see Batch).
        """
        arguments = backbone_arguments(self._config, self._family, input_ids, padding_mask, token_types)
        with self.shown_to(visitor):
            return self._backbone(**arguments).last_hidden_state

    @contextmanager
    def shown_to(self, visitor: ActivationVisitor) -> Iterator[None]:
        """Whatever part of the model runs inside is shown to `visitor`."""
        self._visitor = visitor
        try:
            yield
        finally:
            # Not kept: a graph that outlives its step would hold memory and old parameter shapes.
            self._visitor = self._queries = self._keys = self._values = None

    def run(self, input_ids: Tensor, padding_mask: Tensor | None, token_types: Tensor | None = None) -> Activations:
        """The backbone's forward pass with all activations collected."""
        collector = _Collector()
        last = self.visit(input_ids, padding_mask, collector, token_types)
        hidden, queries, keys, _values = (list(part) for part in zip(*collector.layers, strict=True))
        relations = next((tap for tap in collector.layers if tap.values is not None), None)
        return Activations(collector.embedded, hidden, queries, keys, last, self.scale, relations)

    def record(self, queries: Tensor, keys: Tensor, values: Tensor | None) -> None:
        """Called where attention is computed, inside a layer; with values where they are shown. (B, N or G, T, H)."""
        if self._visitor is not None:
            self._queries, self._keys, self._values = queries, keys, values

    def _before_embedding(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._visitor is not None:
            self._visitor.before_embedding(args, kwargs)

    def _after_embedding(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        if self._visitor is not None:
            self._visitor.embedding(output)

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._visitor is not None:
            self._visitor.before_layer(layer.homodistil_number, args, kwargs)

    def _after_layer(self, layer: nn.Module, _args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        if self._visitor is not None:
            hidden = output[0] if isinstance(output, tuple) else output
            activations = LayerActivations(hidden, self._queries, self._keys, self._values)
            self._visitor.layer(layer.homodistil_number, activations)


class _Collector(ActivationVisitor):
    def __init__(self) -> None:
        self.layers: list[LayerActivations] = []

    def embedding(self, output: Tensor) -> None:
        self.embedded = output

    def layer(self, i: int, tap: LayerActivations) -> None:
        self.layers.append(tap)


def _tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    record = getattr(module, "homodistil_record", None)
    if record is not None:
        record(query, key, value if shows_values(module) else None)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _tapped_attention)
# Without its own entry here the library would build no padding mask for the new name.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
