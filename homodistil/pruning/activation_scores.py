"""Importance by the size of activations, without gradients: Minitron (Muralidharan et al. 2024, arXiv 2407.14679,
section 2.2).

    score of an entry = sqrt( sum over sequences, and over the dims of the entry, of (mean over tokens of |x|)^2 )

That is the paper's best aggregation (mean over the tokens of a sequence, L2 norm over the batch); the norm over dims
comes last, as in NVIDIA's own code (Model-Optimizer). An axis that shows in several places has the sum of its scores:

    hidden                           what norms of the residual stream put out
    ffn                              what enters the output linear of the feed-forward block
    heads, kv_heads, heads_in_group  what enters the output linear of attention, the dims of a head or group together
    vo_dim                           the same, dim by dim
    qk_dim                           queries and keys as attention takes them, behind norms and rotation

`head_norm` has none of its own: its entries go with those of `qk_dim` (pair_selection.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distributed import ranks
from homodistil.errors import UserError
from homodistil.models import axes
from homodistil.models.activation_places import query_key_axes, readers
from homodistil.models.activations import ActivationVisitor, LayerActivations
from homodistil.models.axes import Keep, Widths


def activation_scores(student: Student, steps: Iterable[list[Batch]]) -> Keep:
    """Scores of every axis but `head_norm`, fp32 on the student's device, alike on all ranks. Every rank calls it.

    Args:
        student: plain; in evaluation mode while its activations are measured.
        steps: micro-batches of this rank, a list per global batch.

    Raises:
        UserError: an axis shows nowhere in the model.
    """
    meter, was_training = _Meter(student), student.training
    student.eval()
    try:
        for batches in steps:
            for batch in batches:
                meter.look_at(batch)
    finally:
        meter.detach()
        student.train(was_training)
    return meter.scores()


class _Place:
    """Activations somewhere in the model, and the sum over sequences of their squared means.

    Args:
        grid: axes that they run over, the last one fastest.
        scored: those of `grid` whose entries they score.
    """

    def __init__(self, grid: tuple[str, ...], scored: tuple[str, ...], widths: Widths, device: torch.device) -> None:
        self.grid, self.scored = grid, scored
        self.shape = [widths[axis] for axis in grid]
        self.squares = torch.zeros(math.prod(self.shape), dtype=torch.float64, device=device)

    def add(self, activations: Tensor, mask: Tensor) -> None:
        """Take in activations (B, T, product of the grid's widths). `mask`: fp32 (B, T, 1), 1 = token, 0 = padding."""
        means = (activations.float().abs() * mask).sum(1) / mask.sum(1).clamp_min(1)
        self.squares += means.square().sum(0)


class _Meter(ActivationVisitor):
    """Hooks on a student that feed its places."""

    def __init__(self, student: Student) -> None:
        family, model = student.family, student.model
        self._student, self._table = student, family.axis_table(model)
        self._device = next(student.parameters()).device
        self._places: list[_Place] = []
        self._handles: list = []
        self._mask: Tensor | None = None
        for norm in family.layer_norms(model).values():
            place = self._place(("hidden",))
            self._handles.append(norm.register_forward_hook(functools.partial(self._after, place)))
        for module, over in readers(model, family.backbone(model), self._table):
            self._handles.append(module.register_forward_pre_hook(functools.partial(self._before, self._place(over))))
        self._of_heads = [
            [self._place(over, (f"layer.{i}.qk_dim",)) for over in query_key_axes(self._table, i)]
            for i in range(student.num_layers)
        ]

    def _place(self, grid: tuple[str, ...], scored: tuple[str, ...] | None = None) -> _Place:
        self._places.append(_Place(grid, scored or grid, self._table.widths, self._device))
        return self._places[-1]

    @torch.no_grad()
    def look_at(self, batch: Batch) -> None:
        self._mask = batch.attention_mask.unsqueeze(-1).float()
        self._student.show(batch, self)

    def _after(self, place: _Place, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        place.add(output, self._mask)

    def _before(self, place: _Place, _module: nn.Module, inputs: tuple) -> None:
        place.add(inputs[0], self._mask)

    def layer(self, i: int, tap: LayerActivations) -> None:
        for place, heads in zip(self._of_heads[i], (tap.queries, tap.keys), strict=True):
            place.add(heads.transpose(1, 2).flatten(2), self._mask)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def scores(self) -> Keep:
        """From the sums of all ranks, which cross them in one all-reduce."""
        total = ranks.total(torch.cat([place.squares for place in self._places]))
        widths, outer = self._table.widths, axes.outer_axes(self._table.widths)
        scores = {axis: torch.zeros(index.shape, device=self._device) for axis, index in axes.whole(widths).items()}
        for place, squares in zip(self._places, total.split([len(p.squares) for p in self._places]), strict=True):
            for axis in place.scored:
                of_entries = axes.entry_sums(squares.view(place.shape), place.grid, axis, outer)
                scores[axis] += of_entries.sqrt().float()
        scores.pop("head_norm", None)
        _check_measured(scores)
        return scores


def _check_measured(scores: Keep) -> None:
    if silent := [axis for axis, score in scores.items() if not score.any()]:
        raise UserError(
            f"pruning.importance: found activation, but no activation of this model runs over {', '.join(silent)}; "
            f"set pruning.importance=sensitivity"
        )
