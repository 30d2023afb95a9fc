"""AdamW of a flat tensor, and the importance of the weights in it, from one pass over memory.

The flat tensor is what an optimizer holds: a whole parameter, or a ZeRO partition in which many parameters lie end to
end, the outer ones cut in the middle of a row. `SegmentTable` says which stretch belongs to which matrix. Scores are
|weight before the update * gradient as given|, summed per row and column into one buffer for all parameters
(models/score_layout.py lays it out). The update is torch's fused AdamW to rounding, with torch's own states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from homodistil.kernels.score_sums import add_block_sums, block_numel, block_scores, stretches
from homodistil.kernels.triton_support import use_triton

UNSCORED_COLUMNS = 128
"""Width at which elements that nobody scores are looked at as a matrix."""


class Segment(NamedTuple):
    """Elements [start, start + numel) of a (rows, columns) matrix, at `position` of the flat tensor."""

    position: int
    numel: int
    start: int
    columns: int
    rows_at: int = -1
    """Where in the buffer the sums of the matrix's rows begin; -1: not asked for."""
    columns_at: int = -1

    @property
    def is_scored(self) -> bool:
        return self.rows_at >= 0 or self.columns_at >= 0


class SegmentTable:
    """The segments of one flat tensor, without gaps: what nobody scores is filled up with segments of its own.

    Args:
        segments: scored ones, in any order; no two of the same matrix.
        numel: of the flat tensor.

    Raises:
        ValueError: segments overlap, reach beyond the tensor, or write to the same sums.
    """

    def __init__(self, segments: Sequence[Segment], numel: int) -> None:
        self.numel = numel
        self.segments: list[Segment] = []
        end = 0
        for segment in sorted(segments):
            if segment.position < end or segment.position + segment.numel > numel:
                raise ValueError(f"{segment} overlaps its neighbour or the end of a tensor of {numel} elements")
            self._fill(end, segment.position)
            self.segments.append(segment)
            end = segment.position + segment.numel
        self._fill(end, numel)
        targets = [at for segment in segments for at in (segment.rows_at, segment.columns_at) if at >= 0]
        if len(set(targets)) < len(targets):
            raise ValueError("two segments of one matrix: their sums would overwrite each other")
        self.on_device: dict[torch.device, object] = {}
        """What the Triton form made of the segments; kept with them."""

    def _fill(self, begin: int, end: int) -> None:
        if end > begin:
            self.segments.append(Segment(begin, end - begin, 0, UNSCORED_COLUMNS))


class AdamSettings(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@torch.no_grad()
def adamw_with_sums_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamSettings,
    table: SegmentTable,
    sums: Tensor,
    implementation: str = "auto",
) -> None:
    """One update in place, and the scores of the old weights added up in `sums`.

    Args:
        weight: fp32, contiguous, of any shape; so are both moments.
        gradient: fp32, of that shape.
        step: fp32 (), number of this update, counted up already.
        table: of the flattened weight.
        sums: fp32, the buffer that the segments' `rows_at` and `columns_at` point into; what they point to is zero.
        implementation: "auto" | "torch" | "triton".
    """
    flat = [tensor.detach().view(-1) for tensor in (weight, gradient.contiguous(), exp_avg, exp_avg_sq)]
    if use_triton(implementation, weight.device):
        from homodistil.kernels.adam_importance_triton import launch

        launch(*flat, step, settings, table, sums)
        return
    for segment in table.segments:
        _update_segment([tensor[segment.position :][: segment.numel] for tensor in flat], step, settings, segment, sums)


def _update_segment(
    tensors: list[Tensor], step: Tensor, settings: AdamSettings, segment: Segment, sums: Tensor
) -> None:
    """A block is updated while its weights and gradients are still in the cache from scoring."""
    row_sums = sums[segment.rows_at :] if segment.rows_at >= 0 else None
    column_sums = sums[segment.columns_at :][: segment.columns] if segment.columns_at >= 0 else None
    at_most = block_numel(tensors[0])
    for begin, end in stretches(segment.start, segment.numel, segment.columns, at_most):
        block = [tensor[begin:end] for tensor in tensors]
        if segment.is_scored:
            scores = block_scores(block[0], block[1])
            add_block_sums(scores, segment.start + begin, segment.columns, row_sums, column_sums)
        fused_adamw_(*([tensor] for tensor in block), [step], settings)


def fused_adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    settings: AdamSettings,
) -> None:
    """torch's fused AdamW on a list of tensors; `steps` are counted up already."""
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        amsgrad=False,
        maximize=False,
        **settings._asdict(),
    )
