"""The teacher's side of one micro-batch: every tensor is handed over once, and freed by whoever has compared it.

`WholePass`: the teacher has run as a whole. `Layerwise`: its layers run one by one, each just before the student's
layer that it is compared with. A whole forward leaves 3 x layers tensors of (tokens, hidden) behind that wait for the
student; in lock-step each is compared and freed before the next exists. The numbers are the same: it is the order that
changes.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.activations import ActivationHooks, Activations, ActivationVisitor, LayerActivations
from homodistil.models.family import ModelFamily
from homodistil.models.sentence_head import SentenceHead, pooled


class TeacherOutputs(ABC):
    """What the objective compares the student with. `model` and `family`: the teacher's."""

    def __init__(self, model: nn.Module, family: ModelFamily, batch: Batch, scale: float) -> None:
        self.model, self.family, self.batch = model, family, batch
        self.scale = scale
        """What the teacher's softmax multiplies q.k with."""
        self.sentence_head: SentenceHead | None = None
        """What makes vectors of texts of the last hidden states; of an embedder alone (distill/teacher.py)."""
        self.num_last_readers = 1
        """How often `take_last` will be called: what it gives is freed by the last one."""

    def run_embedding(self, args: tuple, kwargs: dict) -> None:
        """The student's embeddings are about to run, with these arguments."""
        return None

    def run_layer(self, i: int, args: tuple, kwargs: dict) -> None:
        """The student's layer that layer `i` is compared with is about to run, with these arguments."""
        return None

    @abstractmethod
    def take_embedding(self) -> Tensor:
        """What entered layer 0, (B, T, D)."""

    @abstractmethod
    def take_layer(self, i: int) -> LayerActivations:
        """Activations of layer `i`; called in ascending order; layers between are passed over."""

    @abstractmethod
    def take_values(self) -> LayerActivations:
        """Activations of the layer that shows its values, once it has run."""

    def take_last(self) -> Tensor:
        """What the backbone puts out, (B, T, D): what the head reads."""
        self.num_last_readers -= 1
        return self._last(is_done=self.num_last_readers <= 0)

    @abstractmethod
    def _last(self, is_done: bool) -> Tensor:
        """See `take_last`. Held no longer once it `is_done`."""

    @torch.no_grad()
    def logits(self, positions: str) -> Tensor:
        """(rows, V), of the rows that `wanted_rows` says."""
        return self.family.lm_head(self.model)(wanted_rows(self.take_last(), self.batch, positions))

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Vectors of the texts of a sentence embedder, fp32 (B, E), not normalised."""
        mask, head = self.batch.attention_mask, self.sentence_head
        return head.transform(pooled(self.take_last(), mask, head.pooling))

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Logits of the labels of a classifier, fp32 (rows, labels): of each text, or of every token."""
        return self.family.classifier(self.model).logits(self.take_last(), self.batch)

    @torch.no_grad()
    def before_decoder(self, positions: str) -> tuple[Tensor, nn.Linear]:
        """What the decoder would turn into these logits, (rows, D), and the decoder."""
        rows = wanted_rows(self.take_last(), self.batch, positions)
        return self.family.lm_transform(self.model)(rows), self.family.decoder(self.model)


class WholePass(TeacherOutputs):
    """Outputs of a teacher that has run as a whole.

    Args:
        tapped: gives the finished pass; called once, when the student has got as far as to need it.
    """

    def __init__(
        self, model: nn.Module, family: ModelFamily, batch: Batch, scale: float, tapped: Callable[[], Activations]
    ) -> None:
        super().__init__(model, family, batch, scale)
        self._wait, self._tapped = tapped, None
        self._num_taken = 0

    def _seen(self) -> Activations:
        if self._tapped is None:
            self._tapped = self._wait()
        return self._tapped

    def take_embedding(self) -> Tensor:
        return self._seen().embedding

    def take_layer(self, i: int) -> LayerActivations:
        seen = self._seen()
        tap = LayerActivations(seen.layers[i], seen.queries[i], seen.keys[i])
        for done in range(self._num_taken, i + 1):
            seen.queries[done] = seen.keys[done] = seen.layers[done] = None
        self._num_taken = i + 1
        return tap

    def take_values(self) -> LayerActivations:
        relations, self._tapped = self._seen().relations, self._seen()._replace(relations=None)
        return relations

    def _last(self, is_done: bool) -> Tensor:
        last = self._seen().last
        if is_done:
            self._tapped = self._tapped._replace(last=None)
        return last


def own_lists(tapped: Activations) -> Activations:
    """A copy of the lists of a pass for one of several readers, each of which drops what it has compared."""
    return tapped._replace(layers=[*tapped.layers], queries=[*tapped.queries], keys=[*tapped.keys])


class Layerwise(TeacherOutputs, ActivationVisitor):
    """Driven by the student's forward pass, whose masks and ids it takes: one family, one batch."""

    def __init__(self, model: nn.Module, family: ModelFamily, batch: Batch, taps: ActivationHooks) -> None:
        super().__init__(model, family, batch, taps.scale)
        self._layers = family.layers(model)
        self._names = list(inspect.signature(self._layers[0].forward).parameters)
        self._model_options: Sequence[Mapping[str, Any]] | None = None
        self._taps = taps
        self._hidden: Tensor | None = None
        self._tap: LayerActivations | None = None
        self._relations: LayerActivations | None = None
        self._num_run = 0

    @torch.no_grad()
    def run_embedding(self, args: tuple, kwargs: dict) -> None:
        self._hidden = self.family.embed(self.model, self.batch.input_ids, args, kwargs)

    @torch.no_grad()
    def run_layer(self, i: int, args: tuple, kwargs: dict) -> None:
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        del kwargs[self._names[0]]  # the student's hidden states
        if self._model_options is None:  # once for the batch
            self._model_options = self.family.layer_options(self.model, self._hidden, kwargs, self.batch.padding_mask)
        with self._taps.shown_to(self):
            for layer, options in self._layers_to(i):
                layer(self._hidden, **{**kwargs, **options})
        self._num_run = i + 1

    def _layers_to(self, i: int) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        """The layers up to `i` that have not run, each with arguments of its own."""
        start, end = self._num_run, i + 1
        return list(zip(self._layers[start:end], self._model_options[start:end], strict=True))

    def layer(self, _i: int, tap: LayerActivations) -> None:
        self._tap, self._hidden = tap, tap.hidden
        if tap.values is not None:
            self._relations = tap

    def take_embedding(self) -> Tensor:
        return self._hidden

    def take_layer(self, _i: int) -> LayerActivations:
        tap, self._tap = self._tap, None
        return tap

    def take_values(self) -> LayerActivations:
        relations, self._relations = self._relations, None
        return relations

    def _last(self, is_done: bool) -> Tensor:
        norm = self.family.final_norm(self.model)
        last = self._hidden if norm is None else norm(self._hidden)
        if is_done:
            self._hidden = None
        return last


def wanted_rows(hidden: Tensor, batch: Batch, positions: str) -> Tensor:
    """Rows of `hidden` (B, T, D) that meet the vocabulary: (M, D) masked rows, or every valid token in order."""
    index = batch.target_index if positions == "masked" else batch.token_index
    return hidden.flatten(0, 1).index_select(0, index)
