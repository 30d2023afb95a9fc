"""What shrinks: axes (widths) and the parameter dimensions that use them.

A family file (`bert.py`) states one declarative table; importance, selection, resize, export and the tests all
read that table and know nothing else about the model.

    hidden            width of the residual stream, one for the whole model
    layer.{i}.ffn     neurons of the feed-forward block of layer i
    layer.{i}.heads   attention heads of layer i
    layer.{i}.qk_dim  dims of one head shared by query and key
    layer.{i}.vo_dim  dims of one head shared by value and output projection
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

Widths = Mapping[str, int]
"""Axis name -> number of entries. For `qk_dim` and `vo_dim`: entries of ONE head."""

Keep = Mapping[str, Tensor]
"""Axis name -> int64 indices (in the current numbering) that stay, ascending; an absent axis stays whole.

Shape (k,); for `qk_dim` and `vo_dim` (current heads, k): every head chooses its own k dims. The row of a head that
goes in the same event is ignored.
"""


@dataclass(frozen=True)
class AxisUse:
    """Dimension `dim` of `parameter` runs over `axes`: one axis, or (heads, per-head dim) laid out head by head."""

    parameter: str
    dim: int
    axes: tuple[str, ...]
    scored: bool = True
    """False: sliced with the axis, but its entries do not count for importance (distillation projections)."""


@dataclass(frozen=True)
class AxisTable:
    """Every axis of a model with its current width, and every use of it."""

    widths: dict[str, int]
    uses: tuple[AxisUse, ...]

    def prefixed(self, prefix: str) -> AxisTable:
        """The table of the model as a submodule called `prefix` (without the dot)."""
        return replace(self, uses=tuple(replace(u, parameter=f"{prefix}.{u.parameter}") for u in self.uses))

    def with_uses(self, extra: Iterable[AxisUse]) -> AxisTable:
        return replace(self, uses=self.uses + tuple(extra))

    def with_widths(self, widths: Widths) -> AxisTable:
        return replace(self, widths={**self.widths, **widths})

    def uses_by_parameter(self) -> dict[str, list[AxisUse]]:
        grouped: dict[str, list[AxisUse]] = {}
        for use in self.uses:
            grouped.setdefault(use.parameter, []).append(use)
        return grouped

    def dim_size(self, use: AxisUse) -> int:
        """Length of the dimension that `use` describes."""
        size = 1
        for axis in use.axes:
            size *= self.widths[axis]
        return size


def widths_after(widths: Widths, keep: Keep) -> dict[str, int]:
    """Widths once `keep` is applied."""
    return {axis: keep[axis].shape[-1] if axis in keep else size for axis, size in widths.items()}


def compose(kept: Keep, keep: Keep, head_axis_of: Mapping[str, str]) -> dict[str, Tensor]:
    """Where the current entries came from: `kept` (indices into the teacher) narrowed by `keep` (the current
    numbering).

    Args:
        kept: axis -> teacher indices of the current entries, shape (width,) or (heads, width).
        keep: the event about to be applied.
        head_axis_of: per-head axis -> its heads axis (`layer.0.qk_dim` -> `layer.0.heads`).
    """
    narrowed = {}
    for axis, old in kept.items():
        new = old
        if axis in keep:
            new = torch.gather(old, -1, keep[axis])
        if axis in head_axis_of and head_axis_of[axis] in keep:
            new = new[keep[head_axis_of[axis]]]
        narrowed[axis] = new
    return narrowed


def head_axes(widths: Widths) -> dict[str, str]:
    """Per-head axis -> its heads axis, for every layer present in `widths`."""
    per_head = [axis for axis in widths if axis.endswith((".qk_dim", ".vo_dim"))]
    return {axis: axis.rsplit(".", 1)[0] + ".heads" for axis in per_head}


def whole(widths: Widths) -> dict[str, Tensor]:
    """The `kept` record of a model of which nothing has gone yet: every entry is its own origin."""
    heads_of = head_axes(widths)
    record = {}
    for axis, size in widths.items():
        index = torch.arange(size)
        record[axis] = index.repeat(widths[heads_of[axis]], 1) if axis in heads_of else index
    return record


def expand_to_teacher(kept: dict[str, Tensor], teacher_widths: dict[str, int]) -> dict[str, Tensor]:
    """`kept` (origins of the current entries) as a keep in the teacher's numbering.

    The dims of heads get a row for every teacher head; rows of removed heads do not matter.
    """
    keep = {}
    for axis, index in kept.items():
        if index.ndim == 2:
            heads_axis = axis.rsplit(".", 1)[0] + ".heads"
            rows = torch.arange(index.shape[1]).repeat(teacher_widths[heads_axis], 1)
            rows[kept[heads_axis]] = index
            index = rows
        keep[axis] = index
    return keep


def num_layers(widths: Widths) -> int:
    return sum(axis.endswith(".ffn") for axis in widths)


class LayerWidths(NamedTuple):
    """Widths of one layer: everything that is counted (FLOPs, bytes) is counted from these."""

    intermediate_size: int
    num_heads: int
    qk_dim: int
    """Dims of one head of queries and keys."""
    vo_dim: int
    """Dims of one head of values."""


def layer_widths(widths: Widths, layer: int) -> LayerWidths:
    """Widths of layer `layer` (0-based)."""
    return LayerWidths(*(widths[f"layer.{layer}.{name}"] for name in ("ffn", "heads", "qk_dim", "vo_dim")))


def uniform_layer_widths(widths: Widths) -> LayerWidths | None:
    """Widths of every layer where all layers are alike (the dims of values aside), None where they differ."""
    layers = [layer_widths(widths, i) for i in range(num_layers(widths))]
    return layers[0] if len({layer._replace(vo_dim=0) for layer in layers}) == 1 else None


def kind_of(axis: str) -> str:
    """`layer.3.ffn` -> `ffn`; `hidden` -> `hidden`."""
    return axis.rsplit(".", 1)[-1]


def layer_of(axis: str) -> int | None:
    """`layer.3.ffn` -> 3; None for an axis of the whole model."""
    return int(axis.split(".")[1]) if axis.startswith("layer.") else None


def heads_axis(layer: int) -> str:
    """The axis of the attention heads of layer `layer`."""
    return f"layer.{layer}.heads"
