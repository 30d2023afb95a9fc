"""Arithmetic of flat buffers: many parameters laid end to end and cut into equal partitions, one per rank.

`Layout` describes where each parameter lies; `FlatMove` describes how an event maps a layout to a smaller one. This is
integer arithmetic with the same result on every rank, so ranks need not exchange what they will send.

Elements that are kept ("survivors") keep their order, because kept indices ascend. With survivors numbered
consecutively, rank r holds the numbers [kept[r], kept[r + 1]) before the event and [due[r], due[r + 1]) after it.
Re-balancing between ranks therefore moves contiguous ranges only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from homodistil.models.resize_plan import DimIndex

Shape = tuple[int, ...]

WHOLE: DimIndex = {0: torch.empty(0, dtype=torch.int64)}
"""The index of a parameter that leaves as a whole."""


class Piece(NamedTuple):
    """The part of one parameter that lies in a window of the flat buffer."""

    parameter: int
    """Index of the parameter in the layout."""
    position: int
    """First element of the part, counted from the start of the window."""
    start: int
    """First element of the part, as a row-major index into the parameter."""
    numel: int


@dataclass(frozen=True)
class Layout:
    """Parameters of `shapes` at `offsets` in a buffer of `numel` elements, split evenly over `num_partitions` ranks."""

    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    end: int
    """One past the last element of the last parameter; the rest of the buffer is padding."""
    numel: int
    num_partitions: int

    @classmethod
    def packed(
        cls, shapes: Sequence[Shape], num_partitions: int, alignment: int, parameter_alignment: int = 1
    ) -> Layout:
        """Lay `shapes` end to end.

        Args:
            alignment: elements; the length of the buffer is a multiple of it. Must be a multiple of `num_partitions`.
            parameter_alignment: elements; every parameter starts at a multiple of it.
        """
        offsets, end = [], 0
        for shape in shapes:
            start = -(-end // parameter_alignment) * parameter_alignment
            offsets.append(start)
            end = start + math.prod(shape)
        numel = -(-end // alignment) * alignment
        return cls(tuple(map(tuple, shapes)), tuple(offsets), end, numel, num_partitions)

    @property
    def partition_numel(self) -> int:
        return self.numel // self.num_partitions

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Parts of parameters inside [start, stop) of the flat buffer, in order."""
        for i, (shape, offset) in enumerate(zip(self.shapes, self.offsets, strict=True)):
            first, last = max(offset, start), min(offset + math.prod(shape), stop)
            if first < last:
                yield Piece(i, first - start, first - offset, last - first)

    def partition_pieces(self, rank: int) -> Iterator[Piece]:
        return self.pieces(rank * self.partition_numel, (rank + 1) * self.partition_numel)

    def padding(self) -> tuple[int, ...]:
        """Unused elements between each parameter and the next one (0 for the last)."""
        ends = [offset + math.prod(shape) for shape, offset in zip(self.shapes, self.offsets, strict=True)]
        return tuple(following - end for end, following in zip(ends, self.offsets[1:] + (self.end,), strict=True))


@dataclass(frozen=True)
class FlatMove:
    """The change from layout `old` to layout `new`, in which the elements `index` of each parameter are kept.

    A parameter of which nothing is kept (`WHOLE`) has no place in `new`.
    """

    old: Layout
    new: Layout
    index: tuple[DimIndex, ...]
    kept: tuple[int, ...]
    """Number of survivors before each boundary of the old partitions, num_partitions + 1 numbers."""
    due: tuple[int, ...]
    """Number of survivors before each boundary of the new partitions, num_partitions + 1 numbers."""

    @classmethod
    def plan(cls, old: Layout, index: Sequence[DimIndex], alignment: int, parameter_alignment: int = 1) -> FlatMove:
        shapes = [shape_after(shape, kept) for shape, kept in zip(old.shapes, index, strict=True)]
        staying = [shape for shape in shapes if 0 not in shape]
        new = Layout.packed(staying, old.num_partitions, alignment, parameter_alignment)
        boundaries = range(old.num_partitions + 1)
        kept = [
            sum(map(survivors_before, old.shapes, index, [r * old.partition_numel - o for o in old.offsets]))
            for r in boundaries
        ]
        due = [sum(piece.numel for piece in new.pieces(0, r * new.partition_numel)) for r in boundaries]
        return cls(old, new, tuple(index), tuple(kept), tuple(due))

    def send_sizes(self, rank: int) -> list[int]:
        """By receiving rank: number of survivors that `rank` holds before the event and that rank after it."""
        return [_overlap(self.kept, rank, self.due, other) for other in range(self.old.num_partitions)]

    def receive_sizes(self, rank: int) -> list[int]:
        """By sending rank: number of survivors that that rank holds before the event and `rank` after it."""
        return [_overlap(self.kept, other, self.due, rank) for other in range(self.old.num_partitions)]

    def crossing_numel(self) -> int:
        """Number of survivors of one partitioned state that change rank, over all ranks."""
        ranks = range(self.old.num_partitions)
        return sum(numel for r in ranks for other, numel in enumerate(self.send_sizes(r)) if other != r)


def _overlap(a: Sequence[int], i: int, b: Sequence[int], j: int) -> int:
    return max(0, min(a[i + 1], b[j + 1]) - max(a[i], b[j]))


def shape_after(shape: Shape, index: DimIndex) -> Shape:
    return tuple(index[dim].numel() if dim in index else size for dim, size in enumerate(shape))


def survivors_before(shape: Shape, index: DimIndex, stop: int) -> int:
    """Number of survivors of a parameter with a row-major index < `stop` (any integer, also negative)."""
    stop = min(max(stop, 0), math.prod(shape))
    if not index:
        return stop
    if stop == math.prod(shape):
        return math.prod(shape_after(shape, index))
    before, new_shape = 0, shape_after(shape, index)
    for dim in range(len(shape)):
        coordinate, stop = divmod(stop, math.prod(shape[dim + 1 :]))
        rank_among_kept = coordinate
        if dim in index:
            rank_among_kept = int(torch.searchsorted(index[dim], coordinate))
        before += rank_among_kept * math.prod(new_shape[dim + 1 :])
        if dim in index and coordinate not in index[dim]:
            break  # the slice at this coordinate is removed, so nothing inside it survives
    return before


def old_positions(shape: Shape, index: DimIndex, first: int, last: int, device: torch.device) -> Tensor:
    """Row-major indices in the old parameter of its survivors [first, last), (last - first,) int64."""
    remainder = torch.arange(first, last, device=device)
    positions = torch.zeros_like(remainder)
    new_shape = shape_after(shape, index)
    for dim in range(len(shape)):
        stride = math.prod(new_shape[dim + 1 :])
        coordinate = remainder // stride
        remainder = remainder - coordinate * stride
        if dim in index:
            coordinate = index[dim].to(device)[coordinate]
        positions += coordinate * math.prod(shape[dim + 1 :])
    return positions
