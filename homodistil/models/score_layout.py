"""One buffer for the sums of everything that is scored: where each use's sums lie, and how they become scores of axes.

Uses over the same axes lie end to end, so that an axis' scores are a sum over a few rows of the buffer instead of one
addition a parameter; and the whole buffer crosses the ranks in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        stacks = self._stacks(sums)
        for keys, stack in self._shares(stacks) if per_tensor else stacks:
            blocks = self._blocks[keys[0]]
            sizes = [self.table.size_of(block) for block in blocks]
            for block, part in zip(blocks, stack.sum(0).split(sizes), strict=True):
                self._add_block(block, part, scores)
        return scores

    def _stacks(self, sums: Tensor) -> list[tuple[list[tuple[str, int]], Tensor]]:
        """The dimensions that run over the same axes, and their sums, (dimensions, length)."""
        lengths = [len(keys) * sum(map(self.table.size_of, self._blocks[keys[0]])) for keys in self.dims_over.values()]
        parts = zip(self.dims_over.values(), sums.split(lengths), strict=True)
        return [(keys, part.view(len(keys), -1)) for keys, part in parts]

    def _shares(
        self, stacks: list[tuple[list[tuple[str, int]], Tensor]]
    ) -> Iterator[tuple[list[tuple[str, int]], Tensor]]:
        """`stacks` as shares of each parameter's total, which all its dimensions have. A bias counts with its weight:
        the gradient of a key's bias, which the softmax ignores, is nothing but rounding."""
        totals: dict[str, Tensor] = {}
        for keys, stack in stacks:
            totals |= {name: total for (name, _), total in zip(keys, stack.sum(1), strict=True)}
        whole = dict.fromkeys(totals, torch.zeros((), device=stacks[0][1].device))
        for name, total in totals.items():
            whole[self._tensor_of(name)] = whole[self._tensor_of(name)] + total
        for keys, stack in stacks:
            of_keys = torch.stack([whole[self._tensor_of(name)] for name, _ in keys])
            yield keys, stack / of_keys.where(of_keys != 0, 1.0)[:, None]

    def _tensor_of(self, name: str) -> str:
        """The parameter that `name` counts with."""
        weight = name.removesuffix(".bias") + ".weight"
        return weight if name.endswith(".bias") and any((weight, dim) in self._offset for dim in (0, 1)) else name

    def _add_block(self, block: AxisUse, sums: Tensor, scores: dict[str, Tensor]) -> None:
        """Add a block's sums, (its length,), to the scores of every axis that it runs over."""
        outer = axes.outer_axes(self.table.widths)
        grid = sums.view([self.table.widths[axis] for axis in block.axes])
        for axis in block.axes:
            scores[axis] += axes.entry_sums(grid, block.axes, axis, outer)
