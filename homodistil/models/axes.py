"""What shrinks: axes (widths) and the parameter dimensions that use them.

A family states one declarative table; importance, selection, resize, export and the tests all read that table and
know nothing else about the model.

    hidden                    width of the residual stream, one for the whole model
    embedding                 width of embeddings and of what enters the decoder, where it is not the residual stream's
    classifier                width between the two linears of a head of labels
    layer.{i}.ffn             neurons of the feed-forward block of layer i
    layer.{i}.heads           attention heads of layer i, each with keys and values of its own
    heads                     where layers share something by head: the heads of all layers, of which the same ones go
    layer.{i}.kv_heads        where several query heads share keys and values: the key/value heads, one for each group
    layer.{i}.heads_in_group  the query heads of one group
    layer.{i}.qk_dim          dims of one head shared by query and key
    layer.{i}.vo_dim          dims of one head shared by value and output projection
    head_norm                 where queries and keys have norms head by head: dims of these, as many as of rotary heads

A layer has either `heads` (of its own or shared), or `kv_heads` and `heads_in_group`. `heads_in_group`, `qk_dim` and
`vo_dim` are nested: every head (or group) has entries of its own, equally many. Of rotary heads in groups, `qk_dim`
loses the same pairs of dims in all groups of all layers (rotary_pairs.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Widths = Mapping[str, int]
"""Axis name -> number of entries. For a nested axis: entries of ONE head or group."""

_OUTER_KINDS = {"heads_in_group": ("kv_heads",), "qk_dim": ("heads", "kv_heads"), "vo_dim": ("heads", "kv_heads")}
"""Kind of a nested axis -> kinds of the axis around it; a layer has one of them."""

_Value = TypeVar("_Value")

Keep = Mapping[str, Tensor]
"""Axis name -> int64 indices (in the current numbering) that stay, ascending; an absent axis stays whole.

Shape (k,); for a nested axis (current entries of the outer one, k): every head or group chooses its own k. The row of
one that is removed in the same event is ignored.
"""


@dataclass(frozen=True)
class AxisUse:
    """Dimension `dim` of `parameter`, or one block of it, runs over `axes`.

    One axis, or several whose product is laid out with the last one fastest: (heads, qk_dim) head by head; query rows
    of grouped attention (kv_heads, heads_in_group, qk_dim). A nested axis stands behind the one around it.
    """

    parameter: str
    dim: int
    axes: tuple[str, ...]
    scored: bool = True
    """False: sliced with the axis, but its entries do not count for importance (distillation projections)."""
    block: int = 0
    """A dimension of fused weights is made of blocks, one behind the other, each with a use of its own: of
    [query; key; value] these are blocks 0, 1 and 2."""


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

    def blocks(self) -> dict[tuple[str, int], list[AxisUse]]:
        """(parameter, dimension) -> its blocks in order, nearly always one.

        Raises:
            ValueError: a block is missing, or has two uses of other axes (a programming error).
        """
        return self._blocks

    @functools.cached_property
    def _blocks(self) -> dict[tuple[str, int], list[AxisUse]]:
        blocks: dict[tuple[str, int], dict[int, AxisUse]] = {}
        for use in self.uses:
            known = blocks.setdefault((use.parameter, use.dim), {}).setdefault(use.block, use)
            if known.axes != use.axes:
                raise ValueError(f"{use.parameter} dim {use.dim}: two uses, over {known.axes} and over {use.axes}")
        for (name, dim), uses in blocks.items():
            if sorted(uses) != list(range(len(uses))):
                raise ValueError(f"{name} dim {dim}: has the blocks {sorted(uses)}, expected 0 .. {len(uses) - 1}")
        return {key: [uses[i] for i in range(len(uses))] for key, uses in blocks.items()}

    def size_of(self, use: AxisUse) -> int:
        """Length of the block that `use` describes."""
        return math.prod(self.widths[axis] for axis in use.axes)

    def dim_sizes(self, widths: Widths | None = None) -> dict[tuple[str, int], int]:
        """(parameter, dimension) -> its length, for every dimension that the table names.

        Args:
            widths: of axes that are not as wide as the table says; blocks are not looked for again.
        """
        table = self.with_widths(widths or {})
        return {key: sum(map(table.size_of, blocks)) for key, blocks in self.blocks().items()}


def linear_uses(name: str, out: tuple[str, ...], into: tuple[str, ...]) -> list[AxisUse]:
    """The uses of an `nn.Linear` called `name`: its weight (out, in) and, where it has one, its bias (out,)."""
    return [AxisUse(f"{name}.weight", 0, out), AxisUse(f"{name}.weight", 1, into), AxisUse(f"{name}.bias", 0, out)]


def widths_after(widths: Widths, keep: Keep) -> dict[str, int]:
    """Widths once `keep` is applied."""
    return {axis: keep[axis].shape[-1] if axis in keep else size for axis, size in widths.items()}


def compose(kept: Keep, keep: Keep, outer: Mapping[str, str]) -> dict[str, Tensor]:
    """Where the current entries came from: `kept` (indices into the teacher) narrowed by `keep` (the current
    numbering).

    Args:
        kept: axis -> teacher indices of the current entries, shape (width,) or (outer entries, width).
        keep: the event about to be applied.
        outer: from `outer_axes`.
    """
    narrowed = {}
    for axis, old in kept.items():
        new = old
        if axis in keep:
            new = torch.gather(old, -1, keep[axis])
        if axis in outer and outer[axis] in keep:
            new = new[keep[outer[axis]]]
        narrowed[axis] = new
    return narrowed


def outer_axis(axis: str, widths: Widths) -> str | None:
    """The axis that `axis` is nested in (`layer.0.qk_dim` -> `layer.0.heads`); None for one that is not nested."""
    prefix, _, kind = axis.rpartition(".")
    kinds = _OUTER_KINDS.get(kind, ())
    names = (*(f"{prefix}.{outer_kind}" for outer_kind in kinds), *kinds)
    return next((name for name in names if name in widths), None)


def outer_axes(widths: Widths) -> dict[str, str]:
    """Nested axis -> the axis around it, for all axes in `widths`."""
    outer = {axis: outer_axis(axis, widths) for axis in widths}
    return {axis: around for axis, around in outer.items() if around is not None}


def entry_sums(grid: Tensor, along: Sequence[str], axis: str, outer: Mapping[str, str]) -> Tensor:
    """Sums of `grid` for every entry of `axis`, (width,), or (entries of the axis around it, width) of a nested one.

    Args:
        grid: a dim for each axis of `along`, as long as its width.
        outer: from `outer_axes`.
    """
    elsewhere = [i for i, name in enumerate(along) if name not in (axis, outer.get(axis))]
    return grid.sum(elsewhere) if elsewhere else grid


def whole(widths: Widths) -> dict[str, Tensor]:
    """The `kept` record of a model of which nothing has been removed: every entry is its own origin."""
    outer = outer_axes(widths)
    record = {}
    for axis, size in widths.items():
        index = torch.arange(size)
        record[axis] = index.repeat(widths[outer[axis]], 1) if axis in outer else index
    return record


def expand_to_teacher(kept: dict[str, Tensor], teacher_widths: dict[str, int]) -> dict[str, Tensor]:
    """`kept` (origins of the current entries) as a keep in the teacher's numbering.

    A nested axis gets a row for every head or group of the teacher; rows of removed ones do not matter.
    """
    outer = outer_axes(teacher_widths)
    keep = {}
    for axis, index in kept.items():
        if axis in outer:
            rows = torch.arange(index.shape[1]).repeat(teacher_widths[outer[axis]], 1)
            rows[kept[outer[axis]]] = index
            index = rows
        keep[axis] = index
    return keep


def of_layers(by_axis: Mapping[str, _Value], kept: Sequence[int]) -> dict[str, _Value]:
    """`by_axis` once only the layers `kept` (ascending) are left: renumbered, axes of the whole model as they are."""
    number = {layer: i for i, layer in enumerate(kept)}
    return {
        axis if layer is None else f"layer.{number[layer]}.{kind_of(axis)}": value
        for axis, value in by_axis.items()
        if (layer := layer_of(axis)) is None or layer in number
    }


def first_layers(widths: Widths, count: int) -> dict[str, int]:
    """`widths` without the layers from `count` on."""
    return {axis: width for axis, width in widths.items() if (layer_of(axis) or 0) < count}


def embedding_width(widths: Widths) -> int:
    """Width of embeddings and of what enters the decoder: nearly always that of the residual stream."""
    return widths.get("embedding", widths["hidden"])


def num_layers(widths: Widths) -> int:
    return sum(axis.endswith(".ffn") for axis in widths)


class LayerWidths(NamedTuple):
    """Widths of one layer: everything that is counted (FLOPs, bytes) is counted from these."""

    intermediate_size: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Heads of keys and values."""
    qk_dim: int
    """Dims of one head of queries and keys."""
    vo_dim: int
    """Dims of one head of values."""


def layer_widths(widths: Widths, layer: int) -> LayerWidths:
    """Widths of layer `layer` (0-based)."""
    kinds = ("heads", "kv_heads", "heads_in_group")
    of = {kind: widths.get(f"layer.{layer}.{kind}", widths.get(kind)) for kind in kinds}
    ffn, qk_dim, vo_dim = (widths[f"layer.{layer}.{kind}"] for kind in ("ffn", "qk_dim", "vo_dim"))
    if of["heads"] is not None:
        return LayerWidths(ffn, of["heads"], of["heads"], qk_dim, vo_dim)
    return LayerWidths(ffn, of["kv_heads"] * of["heads_in_group"], of["kv_heads"], qk_dim, vo_dim)


def head_origins(kept: Keep, teacher_widths: Widths, layer: int) -> Tensor:
    """Teacher index of every query head that layer `layer` has now, int64 (num_heads,).

    Args:
        kept: axis -> teacher indices of the current entries.
    """
    if (heads := kept.get(f"layer.{layer}.heads", kept.get("heads"))) is not None:
        return heads
    groups, in_group = kept[f"layer.{layer}.kv_heads"], kept[f"layer.{layer}.heads_in_group"]
    return (groups[:, None] * teacher_widths[f"layer.{layer}.heads_in_group"] + in_group).flatten()


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
