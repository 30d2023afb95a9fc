"""Triton form of adam_importance.py: one kernel reads weight, gradient and moments once, updates and scores.

A program takes ROWS rows of one segment over all its columns. So the sums of its rows are its own to write, and those
of its columns are partial: they go to a scratch buffer, 1/ROWS of the elements, which a second, small kernel adds up in
a fixed order. No atomics: the same gradients give the same sums, bit by bit, at about 1 % more traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homodistil.kernels.adam_importance import AdamSettings, Segment, SegmentTable
from homodistil.kernels.triton_support import mend_interpreter

mend_interpreter()

UPDATE = {"ROWS": 32, "COLUMNS": 64, "num_warps": 8}
"""Tile of the update kernel and warps of a program."""
COLLECT = {"BLOCKS": 32, "COLUMNS": 64, "num_warps": 4}
"""Tile of the kernel that adds up partial column sums."""
VECTOR_NUMEL = 4
"""fp32 values of a 16-byte access."""


@triton.jit
def update_kernel(
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    segments_ptr,
    programs_ptr,
    factors_ptr,
    sums_ptr,
    partials_ptr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    keep,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rest = 1 - beta, keep = 1 - lr * weight decay, factors = (lr / correction1, 1 / sqrt(correction2)).

    A segment is seven int64: `Segment`, and where its partial column sums begin. ALIGNED: every row begins at a
    multiple of 16 bytes.
    """
    program = tl.program_id(0)
    segment = segments_ptr + 7 * tl.load(programs_ptr + 2 * program)
    block = tl.load(programs_ptr + 2 * program + 1)
    position, numel, start = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    columns = tl.load(segment + 3).to(tl.int32)
    rows_at, columns_at, partials_at = tl.load(segment + 4), tl.load(segment + 5), tl.load(segment + 6)
    first_row = start // columns + block * ROWS
    origin = first_row * columns  # of this program, in the matrix
    shift = position - start + origin
    begin, end = (start - origin).to(tl.int32), (start + numel - origin).to(tl.int32)
    if ALIGNED:
        columns, shift = tl.multiple_of(columns, 4), tl.multiple_of(shift, 4)
        begin, end = tl.multiple_of(begin, 4), tl.multiple_of(end, 4)
    # Offsets from here on fit into 32 bits, which saves half the registers of addresses.
    weight_ptr += shift
    gradient_ptr += shift
    exp_avg_ptr += shift
    exp_avg_sq_ptr += shift
    partials_ptr += partials_at + block * columns
    step_size, inverse_root = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    row = tl.arange(0, ROWS)
    per_row = tl.zeros([ROWS, COLUMNS], tl.float32)
    for left in range(0, columns, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        at = row[:, None] * columns + column[None, :]
        inside = (column < columns)[None, :] & (at >= begin) & (at < end)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
        exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
        scores = tl.abs(weight * gradient)
        per_row += scores
        if columns_at >= 0:
            tl.store(partials_ptr + column, tl.sum(scores, 0), mask=column < columns)
        exp_avg = beta1 * exp_avg + rest1 * gradient
        exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
        weight = weight * keep - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root + eps)
        tl.store(weight_ptr + at, weight, mask=inside)
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    if rows_at >= 0:
        tl.store(sums_ptr + rows_at + first_row + row, tl.sum(per_row, 1), mask=row * columns < end)


@triton.jit
def collect_kernel(
    segments_ptr, programs_ptr, sums_ptr, partials_ptr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Partial column sums of one segment (one row for each program of the update) -> its column sums."""
    program = tl.program_id(0)
    segment = segments_ptr + 7 * tl.load(programs_ptr + 2 * program)
    column = tl.load(programs_ptr + 2 * program + 1) * COLUMNS + tl.arange(0, COLUMNS)
    numel, start, columns = tl.load(segment + 1), tl.load(segment + 2), tl.load(segment + 3)
    columns_at, partials_at = tl.load(segment + 5), tl.load(segment + 6)
    num_rows = (start + numel - 1) // columns - start // columns + 1
    num_blocks = ((num_rows + ROWS - 1) // ROWS).to(tl.int32)
    total = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (block < num_blocks)[:, None] & (column < columns)[None, :]
        at = partials_at + block[:, None] * columns + column[None, :]
        total += tl.load(partials_ptr + at, mask=inside, other=0.0)
    tl.store(sums_ptr + columns_at + column, tl.sum(total, 0), mask=column < columns)


@dataclass
class DeviceTable:
    """A `SegmentTable` as the kernels read it."""

    segments: Tensor
    """int64 (segments, 7): a `Segment` and where its partial column sums begin (-1: none)."""
    updates: Tensor
    """int32 (programs, 2): segment and block of rows."""
    collects: Tensor
    """int32 (programs, 2): segment and block of columns."""
    num_partials: int
    aligned: bool


def launch(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamSettings,
    table: SegmentTable,
    sums: Tensor,
) -> None:
    """See `adamw_with_sums_`; all tensors flat and fp32. The host waits for nothing."""
    tensors = (weight, gradient, exp_avg, exp_avg_sq)
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError(f"fp32 only, found {[tensor.dtype for tensor in tensors]}")
    device = weight.device
    if device not in table.on_device:
        table.on_device[device] = device_table(table, device)
    found = table.on_device[device]
    partials = torch.empty(found.num_partials, device=device)
    lr, beta1, beta2, eps, weight_decay = settings
    if len(found.updates):
        update_kernel[(len(found.updates),)](
            *tensors,
            found.segments,
            found.updates,
            _factors(step, settings),
            sums,
            partials,
            beta1,
            beta2,
            1 - beta1,  # in double: of 0.999 in fp32 only four digits would be left
            1 - beta2,
            eps,
            1 - lr * weight_decay,
            ALIGNED=found.aligned and all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
            **UPDATE,
        )
    if len(found.collects):
        collect_kernel[(len(found.collects),)](
            found.segments, found.collects, sums, partials, ROWS=UPDATE["ROWS"], **COLLECT
        )


def _factors(step: Tensor, settings: AdamSettings) -> Tensor:
    """fp32 (2,): lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), on the device, where `step` is."""
    step = step.double()
    corrections = [1 - torch.pow(beta, step) for beta in (settings.beta1, settings.beta2)]
    return torch.stack([settings.lr / corrections[0], corrections[1].rsqrt()]).float()


def device_table(table: SegmentTable, device: torch.device) -> DeviceTable:
    rows, updates, collects, num_partials = [], [], [], 0
    for i, segment in enumerate(table.segments):
        num_blocks = -(-_num_rows(segment) // UPDATE["ROWS"])
        updates += [(i, block) for block in range(num_blocks)]
        partials_at = -1
        if segment.columns_at >= 0:
            partials_at, num_partials = num_partials, num_partials + num_blocks * segment.columns
            collects += [(i, block) for block in range(-(-segment.columns // COLLECT["COLUMNS"]))]
        rows.append((*segment, partials_at))

    def on_device(values: list, dtype: torch.dtype, width: int) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(-1, width).to(device)

    aligned = all(value % VECTOR_NUMEL == 0 for segment in table.segments for value in segment[:4])
    return DeviceTable(
        on_device(rows, torch.int64, 7),
        on_device(updates, torch.int32, 2),
        on_device(collects, torch.int32, 2),
        num_partials,
        aligned,
    )


def _num_rows(segment: Segment) -> int:
    """Rows that the segment touches."""
    return (segment.start + segment.numel - 1) // segment.columns - segment.start // segment.columns + 1
