"""Moves surviving elements of flat buffers within and between ranks. Depends on shapes only, not on DeepSpeed.

Survivors keep their order. Each rank compacts its partition to the left in place; the concatenation of the compacted
partitions is the new buffer. One all-to-all of contiguous ranges then makes the partitions equal again, without packing
or metadata, and without extra memory besides the new partition (`move_partition`).

For parameters that are partitioned one by one (ZeRO-3), move_partitions.py exchanges many parameters together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.models.resize_plan import DimIndex
from homodistil.resize.flat import FlatMove, Shape, old_positions, survivors_before

CHUNK_NUMEL = 1 << 18
"""Elements copied at once. This limits temporaries to about 1 MiB, even for large embeddings."""


def move_partition(old: Tensor, move: FlatMove, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """The partition of `rank` in the new buffer. Collective over `group`.

    Args:
        old: the partition of `rank` in the old buffer, flat; its memory is freed.
    """
    numel = compact(old, rank * move.old.partition_numel, move)
    new = exchange(old[:numel], move, rank, group)
    # Freed explicitly: gloo's thread may keep a reference for a moment, while the next partition is already allocated.
    free(old)
    return new


def free(tensor: Tensor) -> None:
    """Free the memory of `tensor` even if there are other references, unless it is a view of a larger tensor."""
    storage = tensor.untyped_storage()
    # Memory that is mapped from a checkpoint file cannot be resized; it is freed with its last reference.
    if storage.nbytes() == tensor.nbytes and storage.resizable():
        storage.resize_(0)


def exchange(survivors: Tensor, move: FlatMove, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """The new partition of `rank`, with zero padding, from the compacted survivors of all ranks. Collective."""
    assert survivors.numel() == move.kept[rank + 1] - move.kept[rank], "compaction and plan disagree"
    start, numel = rank * move.new.partition_numel, move.due[rank + 1] - move.due[rank]
    new = torch.zeros(move.new.partition_numel, dtype=survivors.dtype, device=survivors.device)
    has_gaps = any(move.new.padding())
    landing = torch.empty(numel, dtype=new.dtype, device=new.device) if has_gaps else new[:numel]
    if move.new.num_partitions == 1:
        landing.copy_(survivors)
    else:
        dist.all_to_all_single(landing, survivors, move.receive_sizes(rank), move.send_sizes(rank), group=group)
    if has_gaps:
        spread(landing, new, start, move)
    return new


def spread(survivors: Tensor, new: Tensor, start: int, move: FlatMove) -> None:
    """Copy consecutive survivors to the places of parameters in `new`, a window of the new buffer from `start` on."""
    read = 0
    for piece in move.new.pieces(start, start + new.numel()):
        new[piece.position : piece.position + piece.numel] = survivors[read : read + piece.numel]
        read += piece.numel
    assert read == survivors.numel(), "survivors and new layout disagree"


def compact(buffer: Tensor, start: int, move: FlatMove, chunk_numel: int = CHUNK_NUMEL) -> int:
    """Move the survivors of `buffer` (flat, old elements [start, start + len)) to its front. Returns their number."""
    written = 0
    for piece in move.old.pieces(start, start + buffer.numel()):
        fragment = buffer[piece.position : piece.position + piece.numel]
        shape, index = move.old.shapes[piece.parameter], move.index[piece.parameter]
        if not index and piece.position == written:  # nothing has been removed so far, so it is in place
            written += piece.numel
            continue
        # Chunks are copies in ascending order, so that writes never overtake elements that are still to be read.
        for chunk in _survivor_chunks(fragment, piece.start, shape, index, chunk_numel):
            buffer[written : written + chunk.numel()] = chunk
            written += chunk.numel()
    return written


def _survivor_chunks(fragment: Tensor, start: int, shape: Shape, index: DimIndex, chunk_numel: int) -> Iterator[Tensor]:
    """Copies of the survivors of a parameter's elements [start, start + len(fragment)), in order, flat."""
    stop, row_numel = start + fragment.numel(), math.prod(shape[1:])
    if not index:
        for begin in range(0, fragment.numel(), chunk_numel):
            yield fragment[begin : begin + chunk_numel].clone()
        return
    first_row, last_row = -(-start // row_numel), stop // row_numel
    if any(dim > 1 for dim in index) or first_row >= last_row:
        yield from _scattered_chunks(fragment, start, start, stop, shape, index, chunk_numel)
        return
    yield from _scattered_chunks(fragment, start, start, first_row * row_numel, shape, index, chunk_numel)
    rows = fragment[first_row * row_numel - start : last_row * row_numel - start]
    yield from _row_chunks(rows.view(last_row - first_row, *shape[1:]), first_row, index, chunk_numel)
    yield from _scattered_chunks(fragment, start, last_row * row_numel, stop, shape, index, chunk_numel)


def _row_chunks(rows: Tensor, first_row: int, index: DimIndex, chunk_numel: int) -> Iterator[Tensor]:
    """Survivors of whole rows; many times faster than element by element, because no index per element is needed."""
    step = max(1, chunk_numel // math.prod(rows.shape[1:]))
    for begin in range(0, rows.shape[0], step):
        block = rows[begin : begin + step]
        if 0 in index:
            low = first_row + begin
            bounds = torch.tensor([low, low + block.shape[0]])
            i, j = torch.searchsorted(index[0], bounds).tolist()
            block = block.index_select(0, (index[0][i:j] - low).to(block.device))
        if 1 in index:
            # index_select along columns is several times slower than gather for bf16 on the CPU.
            columns = index[1].to(block.device).view(1, -1, *[1] * (block.ndim - 2))
            block = block.gather(1, columns.expand(block.shape[0], -1, *block.shape[2:]))
        yield block.reshape(-1)


def _scattered_chunks(
    fragment: Tensor, start: int, first: int, last: int, shape: Shape, index: DimIndex, chunk_numel: int
) -> Iterator[Tensor]:
    """Survivors of elements [first, last) of the parameter by index per element; fragment[0] is element `start`."""
    if first == last:  # the usual case: fragments begin and end at row boundaries
        return
    first, last = survivors_before(shape, index, first), survivors_before(shape, index, last)
    for begin in range(first, last, chunk_numel):
        positions = old_positions(shape, index, begin, min(begin + chunk_numel, last), fragment.device)
        yield fragment.index_select(0, positions - start)
