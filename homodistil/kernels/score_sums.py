"""Importance of a stretch of a weight: |weight * gradient| summed per row and per column, by plain torch.

The arithmetic is nothing, the traffic is all: products go block by block through one small buffer, so that only weight
and gradient come from memory (a fresh buffer of the size of a vocabulary matrix costs more than everything else).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 19
"""Elements of a block on a CPU: large enough for the cost of calls, small enough for its caches (measured)."""


@torch.no_grad()
def add_score_sums(
    weight: Tensor,
    gradient: Tensor | None,
    start: int,
    columns: int,
    row_sums: Tensor | None,
    column_sums: Tensor | None,
) -> None:
    """Add the scores of elements [start, start + n) of a (rows, columns) matrix to its sums.

    Args:
        weight: (n,) fp32.
        gradient: (n,) fp32; None: scores are |weight|.
        row_sums: fp32 (rows,), changed in place; None where nobody asks for them.
        column_sums: fp32 (columns,), likewise.
    """
    for begin, end in _stretches(start, len(weight), columns, _block_numel(weight)):
        part = None if gradient is None else gradient[begin:end]
        scores = _block_scores(weight[begin:end], part)
        _add_block_sums(scores, start + begin, columns, row_sums, column_sums)


def _block_numel(tensor: Tensor) -> int:
    """Elements to take at a time: everything on a GPU, where a call costs more than its traffic."""
    return BLOCK_NUMEL if tensor.device.type == "cpu" else max(1, tensor.numel())


def _stretches(start: int, numel: int, columns: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Cut `numel` elements that begin at element `start` of a matrix: ends of cut rows alone, whole rows together."""
    rows_numel = max(1, at_most // columns) * columns
    begin = 0
    while begin < numel:
        column = (start + begin) % columns
        length = columns - column if column else rows_numel
        whole_rows_left = (numel - begin) // columns * columns
        if not column and whole_rows_left:
            length = min(length, whole_rows_left)
        end = min(begin + length, numel)
        yield begin, end
        begin = end


def _block_scores(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|weight * gradient| (n,), in a buffer that the next call writes to."""
    buffer = _buffer(weight.device, len(weight))
    if gradient is None:
        return torch.abs(weight, out=buffer)
    return torch.mul(weight, gradient, out=buffer).abs_()


def _add_block_sums(
    scores: Tensor, start: int, columns: int, row_sums: Tensor | None, column_sums: Tensor | None
) -> None:
    """`scores`: one of `_stretches`, which begins at element `start` of the matrix."""
    row, column = divmod(start, columns)
    if column or len(scores) < columns:  # a part of one row
        if row_sums is not None:
            row_sums[row] += scores.sum()
        if column_sums is not None:
            column_sums[column : column + len(scores)] += scores
        return
    block = scores.view(-1, columns)
    if row_sums is not None:
        row_sums[row : row + len(block)] += block.sum(1)
    if column_sums is not None:
        column_sums += block.sum(0)


def _buffer(device: torch.device, numel: int) -> Tensor:
    # On a GPU torch's allocator hands out the same memory again, in the order of the stream.
    if device.type != "cpu" or numel > BLOCK_NUMEL:
        return torch.empty(numel, device=device)
    return _cpu_buffer(BLOCK_NUMEL)[:numel]


@functools.cache
def _cpu_buffer(numel: int) -> Tensor:
    return torch.empty(numel)
