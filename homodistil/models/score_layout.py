"""One buffer for the sums of everything that is scored: where each use's sums lie, and how they become scores of axes.

Uses over the same axes lie end to end, so that an axis' scores are a sum over a few rows of the buffer instead of one
addition a parameter; and the whole buffer crosses the ranks in one all-reduce.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from homodistil.models import axes
from homodistil.models.axes import AxisTable, AxisUse, Keep


class Target(NamedTuple):
    """Where the sums of one parameter lie; a vector is a matrix of one row."""

    columns: int
    rows_at: int
    """Offset of the sums over columns, one per row; -1: no use of that dimension is scored."""
    columns_at: int


class ScoreLayout:
    """Where the sums of every scored use lie in one buffer.

    Args:
        table: axes at their current widths.
    """

    def __init__(self, table: AxisTable) -> None:
        self.table = table
        self.uses_of: dict[tuple[str, ...], list[AxisUse]] = {}
        for use in table.uses:
            if use.scored:
                self.uses_of.setdefault(use.axes, []).append(use)
        self._offset: dict[tuple[str, int], int] = {}
        self.numel = 0
        for uses in self.uses_of.values():
            for use in uses:
                self._offset[use.parameter, use.dim] = self.numel
                self.numel += table.dim_size(use)

    def target(self, name: str, shape: tuple[int, ...]) -> Target | None:
        """Where the sums of parameter `name` lie at its current shape, one or two dims; None when no use of it is
        scored."""
        offsets = [self._offset.get((name, dim), -1) for dim in range(len(shape))]
        if max(offsets) < 0:
            return None
        return Target(shape[-1], offsets[0] if len(shape) == 2 else -1, offsets[-1])

    def per_axis(self, sums: Tensor) -> Keep:
        """Sums per dimension, (numel,) -> sums per axis entry; a (heads, dims) dimension counts for both its axes."""
        scores = {axis: torch.zeros(i.shape, device=sums.device) for axis, i in axes.whole(self.table.widths).items()}
        position = 0
        for of_axes, uses in self.uses_of.items():
            size = self.table.dim_size(uses[0])
            together = sums[position : position + len(uses) * size].view(len(uses), size).sum(0)
            position += len(uses) * size
            if len(of_axes) == 1:
                scores[of_axes[0]] += together
            else:
                heads, dims = of_axes
                grid = together.view(self.table.widths[heads], self.table.widths[dims])
                scores[heads] += grid.sum(1)
                scores[dims] += grid
        return scores
