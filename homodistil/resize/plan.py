"""What a resize event does to every parameter: kept indices of axes -> kept indices of parameter dimensions.

pruning/selection decides the keep; `make_plan` translates it once, from the same axis table that importance and export
read; `resize()` and `slice_module()` apply it. Nothing here knows of ranks, optimizers or DeepSpeed.

A plan only selects. A linear map per axis would be a change of the surviving values at the old widths, followed by
this same selection, so nothing below the plan (layouts, moves, adapters) would have to change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.models.axes import AxisTable, AxisUse, Keep, head_axes, widths_after

DimIndex = Mapping[int, Tensor]
"""Dimension of a parameter -> int64 indices that stay, ascending, shape (k,); an absent dimension stays whole."""


@dataclass(frozen=True)
class ResizePlan:
    """One resize event, the same on every rank. Indices live on the CPU."""

    keep: Keep
    """What was asked for, by axis."""
    index: dict[str, dict[int, Tensor]]
    """Parameter name -> dimension -> indices that stay. Only dimensions that lose something."""
    sizes: dict[str, dict[int, int]]
    """Parameter name -> dimension -> its length before the event, for exactly the entries of `index`."""
    widths_before: dict[str, int]
    widths_after: dict[str, int]
    hash: str
    """sha256 (hex) over names, dimensions, lengths and indices: equal hashes, equal events."""


def make_plan(table: AxisTable, keep: Keep) -> ResizePlan:
    """Translate `keep` into indices of every parameter that `table` names.

    Raises:
        ValueError: a programming error in the keep (unknown axis, wrong shape, indices not ascending, out of range
            or empty) or in the table (two uses of one dimension that disagree).
    """
    keep = {axis: index.to(device="cpu", dtype=torch.int64) for axis, index in keep.items()}
    _check_table(table)
    _check_keep(table, keep)
    index: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for use in table.uses:
        kept, size = _use_index(table, use, keep), table.dim_size(use)
        if kept is None or kept.numel() == size:  # ascending, in range and as long as before: nothing leaves
            continue
        known = index.setdefault(use.parameter, {}).setdefault(use.dim, kept)
        if not torch.equal(known, kept):
            raise ValueError(f"{use.parameter} dim {use.dim}: two uses in the table keep different indices")
        sizes.setdefault(use.parameter, {})[use.dim] = size
    after = widths_after(table.widths, keep)
    return ResizePlan(keep, index, sizes, dict(table.widths), after, _hash(index, sizes))


def select(tensor: Tensor, index: DimIndex) -> Tensor:
    """The surviving part of `tensor` as a new contiguous tensor; `tensor` itself when nothing leaves."""
    for dim, kept in index.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def _use_index(table: AxisTable, use: AxisUse, keep: Keep) -> Tensor | None:
    """Kept indices of the dimension that `use` describes, None when none of its axes changes."""
    if not any(axis in keep for axis in use.axes):
        return None
    if len(use.axes) == 1:
        return keep[use.axes[0]]
    heads_axis, dim_axis = use.axes
    num_heads, head_dim = table.widths[heads_axis], table.widths[dim_axis]
    heads = keep.get(heads_axis, torch.arange(num_heads))
    dims = keep.get(dim_axis, torch.arange(head_dim).expand(num_heads, head_dim))
    return (heads[:, None] * head_dim + dims[heads]).flatten()  # laid out head by head


def _check_table(table: AxisTable) -> None:
    heads_of = head_axes(table.widths)
    for use in table.uses:
        one_axis = len(use.axes) == 1 and use.axes[0] not in heads_of
        per_head = len(use.axes) == 2 and heads_of.get(use.axes[1]) == use.axes[0]
        if not (one_axis or per_head):
            raise ValueError(f"{use.parameter} dim {use.dim}: {use.axes} is neither one axis nor (heads, head dim)")


def _check_keep(table: AxisTable, keep: Keep) -> None:
    heads_of = head_axes(table.widths)
    for axis, index in sorted(keep.items(), key=lambda entry: entry[0] in heads_of):  # heads before what is per head
        if axis not in table.widths:
            raise ValueError(f"keep names the unknown axis {axis!r}; known: {', '.join(table.widths)}")
        if axis not in heads_of:
            if index.ndim != 1:
                raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected one dimension")
            _check_rows(axis, index[None], table.widths[axis])
            continue
        num_heads = table.widths[heads_of[axis]]
        if index.ndim != 2 or index.shape[0] != num_heads:
            raise ValueError(f"keep[{axis!r}]: shape {tuple(index.shape)}, expected ({num_heads} heads, dims)")
        kept_heads = keep.get(heads_of[axis], torch.arange(num_heads))
        _check_rows(axis, index[kept_heads], table.widths[axis])  # rows of heads that go do not count


def _check_rows(axis: str, rows: Tensor, size: int) -> None:
    if rows.shape[-1] == 0:
        raise ValueError(f"keep[{axis!r}] is empty; an axis keeps at least one entry")
    if int(rows.min()) < 0 or int(rows.max()) >= size:
        raise ValueError(f"keep[{axis!r}]: indices outside 0 .. {size - 1}")
    if not bool((rows[:, 1:] > rows[:, :-1]).all()):
        raise ValueError(f"keep[{axis!r}]: indices are not strictly ascending")


def _hash(index: Mapping[str, DimIndex], sizes: Mapping[str, Mapping[int, int]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(index):
        for dim, kept in sorted(index[name].items()):
            digest.update(f"{name}:{dim}:{sizes[name][dim]}:{kept.numel()};".encode())
            digest.update(kept.numpy().tobytes())
    return digest.hexdigest()
