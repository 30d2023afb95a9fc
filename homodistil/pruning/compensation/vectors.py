"""Compensation by the vectors of texts: which directions they depend on, and a W that makes up for a cut.

Of a sentence embedder, whose student has no vocabulary head. B texts of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.models.backbone import run_backbone
from homodistil.models.family import ModelFamily
from homodistil.models.sentence_head import PoolingMode, pooled
from homodistil.pruning.compensation.least_squares import Rows, fit_linear
from homodistil.pruning.compensation.moments import TINY

MOST_DIRECTIONS = 4
"""Maximum number for each text, used where texts are few."""
ENOUGH_DIRECTIONS = 2048
"""Number over all texts: with 2,048 texts, one direction each gives the same cut as four each (LOG.md)."""


def directions_per_text(num_texts: int) -> int:
    """How many directions are drawn for each text (1 to `MOST_DIRECTIONS`); each costs a backward pass.

    Args:
        num_texts: of the calibration, over all ranks.
    """
    return min(MOST_DIRECTIONS, max(1, ENOUGH_DIRECTIONS // num_texts))


def drawn_directions(batch: Batch, first_sequence: int, seed: int, size: int, num_directions: int) -> Tensor:
    """Standard normal directions, fp32 (num_directions, B, size): the same however texts are dealt out to
    micro-batches.

    Gradients of the vector times such a direction have the second moment J'J: the Fisher information of a normal
    distribution around the vector.

    Args:
        first_sequence: place of the batch's first text among those of all ranks.
        size: dims of a vector.
        num_directions: of each text.
    """
    drawn = [torch.randn(num_directions, size, generator=one) for one in generators(batch, first_sequence, seed)]
    return torch.stack(drawn, 1).to(batch.input_ids.device)


def generators(batch: Batch, first_sequence: int, seed: int) -> Iterator[torch.Generator]:
    """One for each text of `batch`, on the CPU. Arguments as of `drawn_directions`."""
    for b in range(len(batch.input_ids)):
        yield torch.Generator().manual_seed((seed * 1_000_003 + first_sequence + b) % 2**63)


@torch.no_grad()
def fit_projection(
    projection: nn.Linear,
    target: Tensor,
    models: tuple[nn.Module, nn.Module],
    family: ModelFamily,
    batches: Sequence[Batch],
    pooling: PoolingMode,
    ridge: float | None,
) -> None:
    """Fit W, in place, so that the vectors of a cut network are what those of the old one were, by direction.

    Args:
        projection: W' as the cut has left it, (E, d).
        target: W before it, (E, D).
        models: old and new backbone.
        ridge: see `fit_linear`.
    """

    def rows() -> Iterator[Rows]:
        for batch in batches:
            old, new = (pooled_states(model, family, batch, pooling) for model in models)
            wanted = functional.linear(old, target)
            yield Rows(new, wanted, 1 / wanted.norm(dim=1, keepdim=True).clamp(min=TINY))

    fit_linear([projection], rows(), ridge)


def pooled_states(model: nn.Module, family: ModelFamily, batch: Batch, pooling: PoolingMode) -> Tensor:
    """What the backbone puts out, one vector for each text, fp32 (B, D)."""
    hidden = run_backbone(model, family, batch.input_ids, batch.padding_mask, batch.token_types)
    return pooled(hidden, batch.attention_mask, pooling)


@torch.no_grad()
def mean_turn(
    models: tuple[nn.Module, nn.Module],
    rotation: Tensor,
    family: ModelFamily,
    batches: Sequence[Batch],
    pooling: PoolingMode,
) -> tuple[float, int]:
    """(sum over texts of 1 - cosine of the vectors of both models, texts), of this rank.

    Args:
        models: one, and the same after its residual stream has been rotated.
        rotation: (D, D), by which that was done.
    """
    turn, count = 0.0, 0
    for batch in batches:
        before, after = (pooled_states(model, family, batch, pooling) for model in models)
        back = after @ rotation.T.to(after)
        turn += (1 - functional.cosine_similarity(before, back, dim=1)).sum().item()
        count += len(before)
    return turn, count
