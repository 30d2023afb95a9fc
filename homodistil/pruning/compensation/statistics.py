"""What a rotation or projection is chosen by: second moments of activations and gradients, over calibration batches.

One pass of the stock model; hooks add up fp64 products at once, so no activation is kept. Sums are over all ranks.
Rows are valid tokens, N heads, H dims of a head, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.distributed import ranks
from homodistil.models.axes import layer_widths
from homodistil.models.family import ModelFamily
from homodistil.pruning.compensation.least_squares import TINY


class Moments(NamedTuple):
    """Moments of rows with a one appended: sums of products, fp64, (..., K + 1, K + 1)."""

    sums: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sums[..., -1, :-1] / self._count

    @property
    def second(self) -> Tensor:
        """E[x x'], (..., K, K)."""
        return self.sums[..., :-1, :-1] / self._count.unsqueeze(-1)

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @property
    def _count(self) -> Tensor:
        return self.sums[..., -1, -1:].clamp(min=TINY)


class HeadMoments(NamedTuple):
    """Moments of the heads of one layer, each (N, H + 1, H + 1)."""

    query: Moments
    key: Moments
    context: Moments
    """What attention puts out, before the output projection."""


class Statistics(NamedTuple):
    heads: dict[int, HeadMoments]
    """By layer."""
    residual: list[Moments] | None = None
    """Moments of the residual stream behind each LayerNorm; None, like what follows, when not measured."""
    gradient: Tensor | None = None
    """(D, D): E[g g'] of the log-likelihood of labels drawn from the model itself, summed over these places."""
    head_rows: Moments | None = None
    """Moments of what enters the decoder at masked positions, (D + 1, D + 1)."""
    decoder: Tensor | None = None
    """(D, D): `decoder_gram` by the mean predicted probabilities there."""


def collect(
    model: nn.Module,
    family: ModelFamily,
    batches: Sequence[Batch],
    head_layers: Collection[int],
    with_residual: bool,
    seed: int,
) -> Statistics:
    """Statistics of a frozen `model` in evaluation mode. Every rank calls it with its own micro-batches.

    Args:
        head_layers: layers whose heads are looked at.
        with_residual: whether the residual stream is; gradients are taken on the first half of the batches.
        seed: of the labels that are drawn.
    """
    collector = _Collector(model, family, sorted(head_layers), with_residual)
    num_with_gradients = -(-len(batches) // 2) if with_residual else 0
    try:
        for i, batch in enumerate(batches):
            first = (i * ranks.world_size() + ranks.rank()) * len(batch.input_ids)
            collector.run(batch, uniform_numbers(batch, first, seed) if i < num_with_gradients else None)
    finally:
        collector.remove_hooks()
    return collector.result()


class _Collector:
    def __init__(self, model: nn.Module, family: ModelFamily, head_layers: list[int], with_residual: bool) -> None:
        self.model, self.family, self.head_layers = model, family, head_layers
        self._sums: dict[str, Tensor] = {}
        self._batch: Batch | None = None
        self._handles = [handle for i in head_layers for handle in self._hook_heads(i)]
        self._norms = list(family.layer_norms(model).values()) if with_residual else []
        self._handles += [norm.register_forward_hook(partial(self._on_norm, j)) for j, norm in enumerate(self._norms)]

    def _hook_heads(self, i: int) -> list:
        parts = self.family.layer_parts(self.model)[i]
        add = partial(self._add_heads, layer_widths(self.family.axis_table(self.model).widths, i).num_heads)
        return [
            parts.query.register_forward_hook(lambda _module, _args, output: add(f"query.{i}", output)),
            parts.key.register_forward_hook(lambda _module, _args, output: add(f"key.{i}", output)),
            parts.attention_linear.register_forward_pre_hook(lambda _module, args: add(f"context.{i}", args[0])),
        ]

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, batch: Batch, numbers: Tensor | None) -> None:
        """One micro-batch; with gradients when there are `numbers` to draw the labels with."""
        self._batch = batch
        with torch.set_grad_enabled(numbers is not None):
            hidden = self.family.backbone(self.model)(input_ids=batch.input_ids, attention_mask=batch.padding_mask)[0]
            if numbers is not None:
                self._head(hidden.flatten(0, 1)[batch.target_index], numbers)

    def _head(self, hidden: Tensor, numbers: Tensor) -> None:
        rows, decoder = self.family.lm_transform(self.model)(hidden), self.family.decoder(self.model)
        with torch.no_grad():
            probabilities = decoder(rows).softmax(-1)
            self._add("head_rows", _products(rows))
            self._add("predictions", probabilities.sum(0).double())
            labels = draw_labels(probabilities, numbers)
            gradient = probabilities @ decoder.weight - decoder.weight[labels]  # of -log p(label)
        rows.backward(gradient)

    def _on_norm(self, j: int, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self._add(f"residual.{j}", _products(self._rows(output.detach())))
        if torch.is_grad_enabled():
            if not output.requires_grad:  # the embeddings: all parameters are frozen
                output.requires_grad_()
            output.register_hook(lambda gradient: self._add("gradient", _products(self._rows(gradient))))

    @torch.no_grad()
    def _add_heads(self, num_heads: int, name: str, output: Tensor) -> None:
        rows = self._rows(output)
        self._add(name, _products(rows.view(len(rows), num_heads, -1).transpose(0, 1)))

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
        if not self._norms:
            return Statistics(heads)
        residual = [Moments(sums[f"residual.{j}"]) for j in range(len(self._norms))]
        head_rows = Moments(sums["head_rows"])
        predictions = sums["predictions"] / sums["predictions"].sum().clamp(min=TINY)
        gram = decoder_gram(self.family.decoder(self.model).weight, predictions)
        return Statistics(heads, residual, Moments(sums["gradient"]).second, head_rows, gram)


def uniform_numbers(batch: Batch, first_sequence: int, seed: int) -> Tensor:
    """Random numbers in [0, 1), fp32, one for each masked row of `batch`: the same however sequences are dealt out to
    micro-batches.

    Args:
        first_sequence: place of the batch's first sequence among those of all ranks.
    """
    num_sequences, seq_len = batch.input_ids.shape
    seeds = ((seed * 1_000_003 + first_sequence + b) % 2**63 for b in range(num_sequences))
    numbers = [torch.rand(seq_len, generator=torch.Generator().manual_seed(one)) for one in seeds]
    return torch.cat(numbers).to(batch.target_index.device)[batch.target_index]


def draw_labels(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """A label for each row (rows, V), by its cumulative probability; torch.multinomial draws a number an entry."""
    sums = probabilities.cumsum(-1)
    return torch.searchsorted(sums, numbers.unsqueeze(1).to(sums)).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def decoder_gram(decoder_weight: Tensor, predictions: Tensor) -> Tensor:
    """E' diag(p) E, fp64 (D, D): how much directions of what enters the decoder change the logits.

    Args:
        decoder_weight: E, (V, D). Centred by p here, as a common shift of all logits changes nothing.
        predictions: p, (V,).
    """
    rows = decoder_weight.double()
    rows = rows - predictions @ rows
    return rows.T @ (rows * predictions.unsqueeze(1))


def _products(rows: Tensor) -> Tensor:
    """(..., rows, K) -> sums of products with a one appended, (..., K + 1, K + 1), fp64."""
    rows = functional.pad(rows.double(), (0, 1), value=1.0)
    return rows.transpose(-1, -2) @ rows


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over ranks, in one exchange; the same bits on every rank."""
    names = sorted(sums)
    flat = ranks.from_first(ranks.total(torch.cat([sums[name].flatten() for name in names])))
    parts = flat.split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
