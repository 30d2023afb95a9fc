"""Which entries stay: the highest scores of each axis, in their old order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from homodistil.models.axes import Keep


def select(scores: Mapping[str, Tensor], due: Mapping[str, int], protected: Tensor | None = None) -> Keep:
    """Keep for the axes that are due.

    Args:
        scores: axis -> (width,), or (heads, width) for the dims of heads: each head chooses its own.
        due: axis -> number of entries that stay.
        protected: hidden entries (the current numbering) that stay whatever their score.
    """
    keep: dict[str, Tensor] = {}
    for axis, count in due.items():
        score = scores[axis]
        if axis == "hidden" and protected is not None and len(protected):
            score = score.index_fill(0, protected, torch.inf)
        # Stable, so that ties fall alike on every rank and every machine.
        order = torch.argsort(score, dim=-1, descending=True, stable=True)
        keep[axis] = order[..., :count].sort(-1).values
    return keep
