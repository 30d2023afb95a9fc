"""How much every neuron matters: |theta * gradient| of the whole loss, summed per axis entry, smoothed over steps.

Fed with flat pieces of the sharded parameters (every element on exactly one rank); only the per-entry sums travel.
Knows no DeepSpeed: the pieces come from `resize/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed

from homodistil.config.schema import PruningConfig
from homodistil.kernels.score_sums import add_score_sums
from homodistil.models import axes
from homodistil.models.axes import AxisTable, Keep
from homodistil.models.score_layout import ScoreLayout, Target


class Piece(Protocol):
    """Elements [start, start + n) of the flattened parameter `name`, and their averaged gradient, both fp32 (n,)."""

    name: str
    start: int
    weight: Tensor
    gradient: Tensor


class Importance:
    """Smoothed scores of every axis entry, alike on all ranks.

    `sensitivity` (HomoDistil): EMA of sum |theta * g|. `platon` (Zhang et al. 2022): that EMA times the EMA of its
    deviation. `magnitude`: sum |theta| of today. `random`: seeded noise (the control that any criterion must beat).
    `teacher_kl`: like sensitivity, of another loss (calibration.py). `activation` (Minitron): sizes of activations of
    today (activation_scores.py). The last two are fed just before an event instead of by training.
    """

    def __init__(self, table: AxisTable, config: PruningConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.num_updates = 0
        self.average = _zeros(table, device)
        self.uncertainty = _zeros(table, device)

    def measure(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> Keep:
        """One step's sums by axis, equal on all ranks; nothing is added to the average before `accept`. Every rank
        calls it.

        Args:
            pieces: what this rank holds.
            table: axes at their current widths.
            shapes: current shapes of the parameters.
        """
        return {} if self.config.importance == "random" else self._sums(pieces, table, shapes)

    @property
    def _needs_gradients(self) -> bool:
        return self.config.importance in ("sensitivity", "platon", "teacher_kl")

    @property
    def uses_training(self) -> bool:
        """Whether every training step counts; if not, scores are measured apart, just before an event."""
        return self.config.importance not in ("teacher_kl", "activation")

    def accept(self, sums: Keep) -> None:
        """Take in what `measure` gave, once its step has been applied: an overflow's sums are not finite."""
        self._smooth(sums)
        self.num_updates += 1

    def accumulate(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> None:
        """Both at once, where no step can fail in between."""
        self.accept(self.measure(pieces, table, shapes))

    def _sums(self, pieces: Iterable[Piece], table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> Keep:
        layout, sums = ScoreLayout(table), None
        for piece in pieces:
            target = layout.target(piece.name, shapes[piece.name])
            if target is None:
                continue
            if sums is None:  # where the pieces lie: in host memory, with an offloaded optimizer
                sums = torch.zeros(layout.numel, device=piece.weight.device)
            self._add(piece, target, sums)
        return self._over_ranks(layout, torch.zeros(layout.numel) if sums is None else sums)

    def _add(self, piece: Piece, target: Target, sums: Tensor) -> None:
        columns, rows_at, columns_at = target
        add_score_sums(
            piece.weight.detach(),
            piece.gradient if self._needs_gradients else None,
            piece.start,
            columns,
            sums[rows_at:] if rows_at >= 0 else None,
            sums[columns_at : columns_at + columns] if columns_at >= 0 else None,
        )

    def _over_ranks(self, layout: ScoreLayout, sums: Tensor) -> Keep:
        """This rank's share of the sums, (layout.numel,) -> the sums of all, by axis. Every rank calls it."""
        total = sums.to(self.device)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(total)
        return layout.per_axis(total, per_tensor=self.config.score_normalisation == "per_tensor")

    def _smooth(self, fresh: Keep) -> None:
        beta, beta_uncertainty = self.config.ema_beta, self.config.uncertainty_beta
        if self.config.importance in ("magnitude", "activation"):
            beta = 0.0
        if not fresh:
            return
        values, averages = list(fresh.values()), [self.average[axis] for axis in fresh]
        torch._foreach_lerp_(averages, values, 1 - beta)
        deviations = torch._foreach_sub(values, averages)
        torch._foreach_abs_(deviations)
        torch._foreach_lerp_([self.uncertainty[axis] for axis in fresh], deviations, 1 - beta_uncertainty)

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
        outer = axes.outer_axes(widths)
        self.average = axes.compose(self.average, on_device, outer)
        self.uncertainty = axes.compose(self.uncertainty, on_device, outer)

    def keep_layers(self, kept: Sequence[int]) -> None:
        """Keep the scores of the layers `kept`, renumbered in order."""
        self.average, self.uncertainty = axes.of_layers(self.average, kept), axes.of_layers(self.uncertainty, kept)

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "average": self.average, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        self.average = {axis: value.to(self.device) for axis, value in state["average"].items()}
        self.uncertainty = {axis: value.to(self.device) for axis, value in state["uncertainty"].items()}


def _zeros(table: AxisTable, device: torch.device) -> dict[str, Tensor]:
    return {axis: torch.zeros(index.shape, device=device) for axis, index in axes.whole(table.widths).items()}
