"""How much every neuron matters: |theta * gradient| of the whole loss, summed per axis entry, smoothed over steps.

Fed with flat pieces of the sharded parameters (every element on exactly one rank); only the per-entry sums travel.
Knows no DeepSpeed: the pieces come from `resize/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, distributed

from homodistil.config import PruningConfig
from homodistil.models import axes
from homodistil.models.axes import AxisTable, AxisUse, Keep


class Piece(Protocol):
    """Elements [start, start + n) of the flattened parameter `name`, and their averaged gradient, both fp32 (n,)."""

    name: str
    start: int
    weight: Tensor
    gradient: Tensor


def add_dim_sums(values: Tensor, start: int, shape: tuple[int, ...], dim: int, sums: Tensor) -> None:
    """Add `values`, elements [start, start + n) of a row-major tensor, to the sums over all other dims.

    Args:
        values: (n,).
        shape: of the whole tensor, one or two dims.
        dim: the dim that stays.
        sums: (shape[dim],), changed in place.
    """
    if len(shape) == 1:
        sums[start : start + len(values)] += values
        return
    columns = shape[1]
    head = min((-start) % columns, len(values))
    whole_rows = (len(values) - head) // columns
    tail = head + whole_rows * columns
    row, column = divmod(start, columns)
    if head:
        _add_part(values[:head], row, column, dim, sums)
    if whole_rows:
        first = row + (1 if head else 0)
        block = values[head:tail].view(whole_rows, columns)
        if dim == 0:
            sums[first : first + whole_rows] += block.sum(1)
        else:
            sums += block.sum(0)
    if tail < len(values):
        _add_part(values[tail:], (start + tail) // columns, 0, dim, sums)


def _add_part(part: Tensor, row: int, column: int, dim: int, sums: Tensor) -> None:
    """A piece of one row that starts at `column`."""
    if dim == 0:
        sums[row] += part.sum()
    else:
        sums[column : column + len(part)] += part


class Importance:
    """Smoothed scores of every axis entry, alike on all ranks.

    `sensitivity` (HomoDistil): EMA of sum |theta * g|. `platon` (Zhang et al. 2022): that EMA times the EMA of its
    deviation. `magnitude`: sum |theta| of today. `random`: seeded noise (the control that any criterion must beat).
    """

    def __init__(self, table: AxisTable, config: PruningConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.num_updates = 0
        self.average = _zeros(table, device)
        self.uncertainty = _zeros(table, device)

    def measure(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> Keep:
        """One step's sums by axis, alike on all ranks; nothing is taken in before `accept`. Every rank calls it.

        Args:
            pieces: what this rank holds.
            table: axes at their widths of today.
            shapes: of the parameters today.
        """
        return {} if self.config.importance == "random" else self._sums(pieces, table, shapes)

    def accept(self, sums: Keep) -> None:
        """Take in what `measure` gave, once its step has been applied: an overflow's sums are not finite."""
        self._smooth(sums)
        self.num_updates += 1

    def accumulate(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> None:
        """Both at once, where no step can fail in between."""
        self.accept(self.measure(pieces, table, shapes))

    def _sums(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> Keep:
        uses = table.uses_by_parameter()
        dim_sums: dict[AxisUse, Tensor] = {}
        for piece in pieces:
            scored = [use for use in uses.get(piece.name, ()) if use.scored]
            if not scored:
                continue
            value = self._element_scores(piece)
            for use in scored:
                if use not in dim_sums:  # where the pieces lie: in host memory, with an offloaded optimizer
                    dim_sums[use] = torch.zeros(table.dim_size(use), device=value.device)
                add_dim_sums(value, piece.start, shapes[piece.name], use.dim, dim_sums[use])
        absent = {use: torch.zeros(table.dim_size(use)) for use in table.uses if use.scored and use not in dim_sums}
        on_device = {use: (dim_sums | absent)[use].to(self.device) for use in table.uses if use.scored}
        _sum_over_ranks(list(on_device.values()))
        return _per_axis(on_device, table, self.device)

    def _element_scores(self, piece: Piece) -> Tensor:
        if self.config.importance == "magnitude":
            return piece.weight.detach().abs()
        return (piece.weight.detach() * piece.gradient).abs_()

    def _smooth(self, fresh: Keep) -> None:
        beta, beta_uncertainty = self.config.ema_beta, self.config.uncertainty_beta
        if self.config.importance == "magnitude":
            beta = 0.0
        for axis, value in fresh.items():
            self.average[axis].lerp_(value, 1 - beta)
            deviation = (value - self.average[axis]).abs()
            self.uncertainty[axis].lerp_(deviation, 1 - beta_uncertainty)

    def scores(self) -> dict[str, Tensor]:
        """Axis -> fp32 scores, (width,) or (heads, width) for the dims of heads, on the CPU."""
        if self.config.importance == "random":
            return self._noise()
        if self.config.importance == "platon":
            return {axis: (value * self.uncertainty[axis]).cpu() for axis, value in self.average.items()}
        return {axis: value.cpu() for axis, value in self.average.items()}

    def _noise(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_updates)
        return {axis: torch.rand(value.shape, generator=generator) for axis, value in self.average.items()}

    def narrow(self, keep: Keep) -> None:
        """Keep the scores of the entries that stay."""
        widths = {axis: value.shape[-1] for axis, value in self.average.items()}
        on_device = {axis: index.to(self.device) for axis, index in keep.items()}
        heads_of = axes.head_axes(widths)
        self.average = axes.compose(self.average, on_device, heads_of)
        self.uncertainty = axes.compose(self.uncertainty, on_device, heads_of)

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "average": self.average, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        self.average = {axis: value.to(self.device) for axis, value in state["average"].items()}
        self.uncertainty = {axis: value.to(self.device) for axis, value in state["uncertainty"].items()}


def _zeros(table: AxisTable, device: torch.device) -> dict[str, Tensor]:
    return {axis: torch.zeros(index.shape, device=device) for axis, index in axes.whole(table.widths).items()}


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    """One all-reduce for all of them."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    flat = torch.cat(tensors)
    distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([len(t) for t in tensors]), strict=True):
        tensor.copy_(part)


def _per_axis(dim_sums: dict[AxisUse, Tensor], table: AxisTable, device: torch.device) -> dict[str, Tensor]:
    """Sums per dimension -> sums per axis entry; a (heads, dims) dimension counts for both of its axes."""
    scores = _zeros(table, device)
    for use, value in dim_sums.items():
        if len(use.axes) == 1:
            scores[use.axes[0]] += value
        else:
            heads, dims = use.axes
            grid = value.view(table.widths[heads], table.widths[dims])
            scores[heads] += grid.sum(1)
            scores[dims] += grid
    return scores
