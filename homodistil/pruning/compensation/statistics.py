"""What a rotation or projection is chosen by: second moments of activations and gradients, over calibration batches.

One pass of the stock model; hooks add up products at once (moments.py), so no activation is kept. Sums are over all
ranks.
Rows are valid tokens, N heads, H dims of a head, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from homodistil.data.batch import Batch
from homodistil.distributed import ranks
from homodistil.models.axes import layer_widths
from homodistil.models.backbone import run_backbone
from homodistil.models.classifier import LogitKind
from homodistil.models.family import ModelFamily
from homodistil.models.norms import Norm
from homodistil.models.sentence_head import PoolingMode, pooled
from homodistil.pruning.compensation.label_draws import draw_labels, uniform_numbers
from homodistil.pruning.compensation.labels import drawn_logit_directions
from homodistil.pruning.compensation.moments import TINY, Moments, moments_of
from homodistil.pruning.compensation.vectors import directions_per_text, drawn_directions

_LOGITS_AT_ONCE = 1 << 25
"""Elements: 128 MiB of probabilities in fp32."""


class HeadMoments(NamedTuple):
    """Moments of the heads of one layer, each (N, H + 1, H + 1)."""

    query: Moments
    key: Moments
    context: Moments
    """What attention puts out, before the output projection."""


class Statistics(NamedTuple):
    heads: dict[int, HeadMoments]
    """By layer."""
    is_centred: bool = True
    """Whether the norms of the residual stream take the mean over dims out of every row."""
    hides_mean: bool = False
    """Whether nothing but such norms reads the stream, so that its mean over dims does not matter."""
    residual: list[Moments] | None = None
    """Moments of the residual stream as each block reads it, behind a norm; None when not measured."""
    gradient: Tensor | None = None
    """(D, D): E[g g'] of the log-likelihood of labels drawn from the model itself, or of vectors of texts or logits of
    labels in directions drawn for them, summed over these places; None where directions are not weighed by it."""
    head_rows: Moments | None = None
    """Moments of what enters the decoder at the rows to predict, (D + 1, D + 1); None: the model has no head."""
    decoder: Tensor | None = None
    """(D, D): `decoder_gram` by the mean predicted probabilities there."""
    vectors: Moments | None = None
    """Moments of the normalised vectors of texts, or of what a head of labels reads, (D + 1, D + 1); None: there is
    neither."""


def collect(
    model: nn.Module,
    family: ModelFamily,
    batches: Sequence[Batch],
    head_layers: Collection[int],
    basis: Literal["fisher", "pca"] | None,
    seed: int,
    pooling: PoolingMode | None = None,
    logits: LogitKind | None = None,
) -> Statistics:
    """Statistics of a frozen `model` in evaluation mode. Every rank calls it with its own micro-batches.

    Args:
        head_layers: layers whose heads are looked at.
        basis: None: the residual stream is not looked at. pca: its activations are, and what the head predicts, if the
            model has one, on the first half of the batches; fisher: gradients there, too.
        seed: of the labels or directions that are drawn.
        pooling: of a sentence embedder, whose vectors then stand for what a head predicts, on all batches.
        logits: of a classifier, whose labels do, likewise.
    """
    collector = _Collector(model, family, sorted(head_layers), basis)
    num_with_head = -(-len(batches) // 2) if basis is not None and family.has_head(model) else 0
    num_directions = directions_per_text(ranks.world_size() * sum(len(batch.input_ids) for batch in batches))
    try:
        for i, batch in enumerate(batches):
            first = (i * ranks.world_size() + ranks.rank()) * len(batch.input_ids)
            if basis is not None and pooling is not None:
                size = family.axis_table(model).widths["hidden"]
                collector.run_vectors(batch, drawn_directions(batch, first, seed, size, num_directions), pooling)
            elif basis is not None and logits is not None:
                per_text = None if family.labels_tokens(model) else num_directions
                draw = partial(drawn_logit_directions, batch, first, seed, logits, num_directions=per_text)
                collector.run_labels(batch, draw)
            else:
                collector.run(batch, uniform_numbers(batch, first, seed) if i < num_with_head else None)
    finally:
        collector.remove_hooks()
    return collector.result()


class _Place(NamedTuple):
    """Where the residual stream is looked at: behind `norm`, or in front of `entry`, which reads it as it is."""

    norm: Norm | None
    entry: nn.Module | None = None

    def observe(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        if self.norm is None:
            return self.entry.register_forward_pre_hook(lambda _module, args: see(args[0]))
        return self.norm.module.register_forward_hook(lambda _module, _args, output: see(output))


def _places(model: nn.Module, family: ModelFamily) -> list[_Place]:
    """In forward order; the last one is what the backbone puts out."""
    blocks = [block for i in range(len(family.layers(model))) for block in family.blocks(model, i)]
    ends = family.embedding_norm(model), family.norm(family.final_norm(model))
    places = [_Place(block.input_norm or block.stream_norm, block.entry) for block in blocks]
    return [_Place(ends[0])] * (ends[0] is not None) + places + [_Place(ends[1])] * (ends[1] is not None)


class _Collector:
    def __init__(self, model: nn.Module, family: ModelFamily, head_layers: list[int], basis: str | None) -> None:
        self.model, self.family, self.head_layers = model, family, head_layers
        self._with_gradients = basis == "fisher"
        self._sums: dict[str, Tensor] = {}
        self._batch: Batch | None = None
        self._handles = [handle for i in head_layers for handle in self._hook_heads(i)]
        self._places = _places(model, family) if basis is not None else []
        self._handles += [place.observe(partial(self._on_place, j)) for j, place in enumerate(self._places)]

    def _hook_heads(self, i: int) -> list:
        parts = self.family.head_linears(self.model, i)
        add = partial(self._add_heads, layer_widths(self.family.axis_table(self.model).widths, i).num_heads)
        return [
            parts.query.register_forward_hook(lambda _module, _args, output: add(f"query.{i}", output)),
            parts.key.register_forward_hook(lambda _module, _args, output: add(f"key.{i}", output)),
            parts.output.register_forward_pre_hook(lambda _module, args: add(f"context.{i}", args[0])),
        ]

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, batch: Batch, numbers: Tensor | None) -> None:
        """One micro-batch; with the head where there are `numbers` to draw labels with."""
        self._batch = batch
        with torch.set_grad_enabled(numbers is not None and self._with_gradients):
            hidden = run_backbone(self.model, self.family, batch.input_ids, batch.padding_mask, batch.token_types)
            if numbers is not None:
                rows = self.family.lm_transform(self.model)(hidden.flatten(0, 1)[batch.target_index])
                gradient = self._head_gradient(rows.detach(), numbers)
                if rows.requires_grad:
                    rows.backward(gradient)

    def run_vectors(self, batch: Batch, directions: Tensor, pooling: PoolingMode) -> None:
        """One micro-batch of single texts, whose normalised vectors are seen, and their gradients in `directions`."""
        self._batch = batch
        with torch.set_grad_enabled(self._with_gradients):
            hidden = run_backbone(self.model, self.family, batch.input_ids, batch.padding_mask, batch.token_types)
            vectors = functional.normalize(pooled(hidden, batch.attention_mask, pooling), dim=-1)
            self._add("vectors", moments_of(vectors.detach()))
            if vectors.requires_grad:
                for one in directions:
                    vectors.backward(one, retain_graph=True)

    def run_labels(self, batch: Batch, draw: Callable[[Tensor], Tensor]) -> None:
        """One micro-batch of single texts: what the head of labels reads is seen, and gradients of its logits.

        Args:
            draw: logits (R, L) -> directions (draws, R, L).
        """
        self._batch, head = batch, self.family.classifier(self.model)
        with torch.set_grad_enabled(self._with_gradients):
            hidden = run_backbone(self.model, self.family, batch.input_ids, batch.padding_mask, batch.token_types)
            self._add("vectors", moments_of(head.rows(hidden.detach(), batch)))
            logits = head.logits(hidden, batch)
            if logits.requires_grad:
                for one in draw(logits.detach()):
                    logits.backward(one, retain_graph=True)

    @torch.no_grad()
    def _head_gradient(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Gradient of -log p(label) with respect to what enters the decoder, (rows, D), by chunks of rows."""
        decoder = self.family.decoder(self.model)
        self._add("head_rows", moments_of(rows))
        size = max(1, _LOGITS_AT_ONCE // len(decoder.weight))
        parts = zip(rows.split(size), numbers.split(size), strict=True)
        return torch.cat([self._chunk_gradient(decoder, *part) for part in parts])

    def _chunk_gradient(self, decoder: nn.Linear, rows: Tensor, numbers: Tensor) -> Tensor:
        probabilities = decoder(rows).softmax(-1)
        self._add("predictions", probabilities.sum(0).double())
        labels = draw_labels(probabilities, numbers)
        return probabilities @ decoder.weight - decoder.weight[labels]

    def _on_place(self, j: int, stream: Tensor) -> None:
        self._add(f"residual.{j}", moments_of(self._rows(stream.detach())))
        if torch.is_grad_enabled():
            if not stream.requires_grad:  # the first place: all parameters are frozen
                stream.requires_grad_()
            stream.register_hook(lambda gradient: self._add("gradient", moments_of(self._rows(gradient))))

    @torch.no_grad()
    def _add_heads(self, num_heads: int, name: str, output: Tensor) -> None:
        rows = self._rows(output).double()  # they are inverted with a millionth of their mean added
        self._add(name, moments_of(rows.view(len(rows), num_heads, -1).transpose(0, 1)))

    def _rows(self, activations: Tensor) -> Tensor:
        """(B, T, K) -> (valid tokens, K)."""
        rows = activations.flatten(0, 1)
        return rows if self._batch.padding_mask is None else rows[self._batch.token_index]

    def _add(self, name: str, part: Tensor) -> None:
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    def result(self) -> Statistics:
        sums = _over_ranks(self._sums)
        heads = {
            i: HeadMoments(*(Moments(sums[f"{part}.{i}"]) for part in HeadMoments._fields)) for i in self.head_layers
        }
        if not self._places:
            return Statistics(heads)
        residual = [Moments(sums[f"residual.{j}"]) for j in range(len(self._places))]
        is_centred = all(place.norm.is_centred for place in self._places if place.norm is not None)
        kinds = is_centred, is_centred and self.family.rotation_is_exact(self.model)
        gradient = Moments(sums["gradient"]).second if "gradient" in sums else None
        if "predictions" not in sums:
            vectors = Moments(sums["vectors"]) if "vectors" in sums else None
            return Statistics(heads, *kinds, residual, gradient, vectors=vectors)
        head_rows = Moments(sums["head_rows"])
        predictions = sums["predictions"] / sums["predictions"].sum().clamp(min=TINY)
        gram = decoder_gram(self.family.decoder(self.model).weight, predictions)
        return Statistics(heads, *kinds, residual, gradient, head_rows, gram)


def decoder_gram(decoder_weight: Tensor, predictions: Tensor) -> Tensor:
    """E' diag(p) E, fp64 (D, D): how much directions of what enters the decoder change the logits.

    Args:
        decoder_weight: E, (V, D). Centred by p here, as a common shift of all logits changes nothing.
        predictions: p, (V,).
    """
    rows = decoder_weight.double()
    rows = rows - predictions @ rows
    return rows.T @ (rows * predictions.unsqueeze(1))


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over ranks, in one exchange; the same bits on every rank."""
    names = sorted(sums)
    flat = ranks.from_first(ranks.total(torch.cat([sums[name].flatten() for name in names])))
    parts = flat.split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
