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
        self.dims_over: dict[tuple[tuple[str, ...], ...], list[tuple[str, int]]] = {}
        """Axes of a dimension's blocks -> the scored dimensions, (parameter, dim), that are made of such blocks."""
        self._blocks = table.blocks()
        for key, blocks in self._blocks.items():
            if all(use.scored for use in blocks):
                self.dims_over.setdefault(tuple(use.axes for use in blocks), []).append(key)
        self._offset: dict[tuple[str, int], int] = {}
        self.numel = 0
        sizes = table.dim_sizes()
        for keys in self.dims_over.values():
            for key in keys:
                self._offset[key] = self.numel
                self.numel += sizes[key]

    def target(self, name: str, shape: tuple[int, ...]) -> Target | None:
        """Where the sums of parameter `name` lie at its current shape, one or two dims; None when no use of it is
        scored."""
        offsets = [self._offset.get((name, dim), -1) for dim in range(len(shape))]
        if max(offsets) < 0:
            return None
        return Target(shape[-1], offsets[0] if len(shape) == 2 else -1, offsets[-1])

    def per_axis(self, sums: Tensor, per_tensor: bool = False) -> Keep:
        """Sums per dimension, (numel,) -> sums per axis entry; a (heads, dims) dimension counts for both its axes.

        Args:
            sums: over all ranks.
            per_tensor: divide the sums of every parameter by their total first, so that each use has an equal say.
        """
        scores = {axis: torch.zeros(i.shape, device=sums.device) for axis, i in axes.whole(self.table.widths).items()}
        position = 0
        for keys in self.dims_over.values():
            blocks = self._blocks[keys[0]]
            sizes = [self.table.size_of(block) for block in blocks]
            length = len(keys) * sum(sizes)
            stacked = sums[position : position + length].view(len(keys), -1)
            together = (_shares(stacked) if per_tensor else stacked).sum(0)
            position += length
            for block, part in zip(blocks, together.split(sizes), strict=True):
                self._add_block(block, part, scores)
        return scores

    def _add_block(self, block: AxisUse, sums: Tensor, scores: dict[str, Tensor]) -> None:
        """Add a block's sums, (its length,), to the scores of every axis that it runs over."""
        outer = axes.outer_axes(self.table.widths)
        grid = sums.view([self.table.widths[axis] for axis in block.axes])
        for axis in block.axes:
            scores[axis] += axes.entry_sums(grid, block.axes, axis, outer)


def _shares(sums: Tensor) -> Tensor:
    """Sums over all of a dimension of some parameters, (parameters, length), as shares of each parameter's total.

    A parameter without any score keeps its zeros; one that is not finite stays so.
    """
    totals = sums.sum(1, keepdim=True)
    return sums / totals.where(totals != 0, 1.0)
