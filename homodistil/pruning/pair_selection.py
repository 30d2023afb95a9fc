"""Which rotary pairs stay: the same in all heads of all layers, on the way to the best progression of the final size.

What is left at the end has to be an arithmetic progression (models/rotary_pairs.py). So every event keeps, of those
that are still there, the one with the largest summed importance, and fills up with the best of the rest. Nothing has to
be remembered between events.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from homodistil.models.axes import Keep
from homodistil.models.rotary_pairs import dims_of, progressions, runs_over_pairs


def select_dims(scores: Mapping[str, Tensor], due: Mapping[str, int], kept: Tensor, target: int) -> Keep:
    """Keep for those axes of `due` that run over rotary dims: the same dims for every row of each.

    Args:
        scores: axis -> (width,), or (groups, width) for the dims of heads.
        due: axis -> number of entries that stay, equal for all such axes.
        kept: origin of each pair that is still there, int64 ascending (pairs,).
        target: dims of a head at the end.
    """
    widths = {axis: score.shape[-1] for axis, score in scores.items()}
    axes = [axis for axis in due if runs_over_pairs(axis, widths)]
    if not axes:
        return {}
    # Axes that are alike, and rows of groups: summed in fp64, so that the order does not decide.
    dims = torch.stack([scores[axis].double().reshape(-1, widths[axis]).sum(0) for axis in axes]).sum(0)
    pairs = select_pairs(dims.view(2, -1).sum(0), kept, due[axes[0]] // 2, target // 2)
    index = dims_of(pairs, len(kept))
    return {axis: index.repeat(len(scores[axis]), 1) if scores[axis].ndim == 2 else index for axis in axes}


def select_pairs(scores: Tensor, kept: Tensor, count: int, target: int) -> Tensor:
    """Which of the pairs that are still there stay, int64 ascending (count,), in the current numbering.

    Args:
        scores: (pairs,).
        kept: origin of each pair, int64 ascending (pairs,).
        count: pairs that stay.
        target: pairs at the end, at most `count`.
    """
    best = best_progression(scores, kept, target)
    scores = scores.index_fill(0, best, torch.inf)
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def best_progression(scores: Tensor, kept: Tensor, length: int) -> Tensor:
    """The progression of `length` origins among `kept` with the largest summed score, the first of equal ones; int64
    ascending (length,), in the current numbering."""
    number = {origin: i for i, origin in enumerate(kept.tolist())}
    there = (p for p in progressions(1 + max(number), length) if all(origin in number for origin in p))
    candidates = torch.tensor([[number[origin] for origin in p] for p in there])
    return candidates[scores[candidates].sum(1).argmax()]
