"""`optimizer.implementation=homodistil_fused`: AdamW that takes the importance sums out of the pass that updates.

Before a step somebody says what lies where (`CountingAdamW.count`); the step then reads weights and gradients once for
both purposes. The gradients it sees are unscaled and clipped, in each of DeepSpeed's wrappers by its own formula, while
importance is defined on those before. So a probe is taken of both: the L1 norm of the vectors (biases, LayerNorm). The
ratio is the factor, whatever the formula. The probes travel with the sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from homodistil.kernels.adam_importance import AdamSettings, Segment, SegmentTable, adamw_with_sums_, fused_adamw_
from homodistil.models.axes import AxisTable
from homodistil.models.score_layout import ScoreLayout, Target
from homodistil.resize import MasterSlice


@dataclass
class Count:
    """What one step is to count, and what it counted: this rank's share, at the widths of today."""

    table: AxisTable
    layout: ScoreLayout
    segments: dict[Tensor, SegmentTable]
    """By the tensor that the optimizer updates."""
    probes: dict[Tensor, list[MasterSlice]]
    """Vectors, likewise."""
    probe_names: set[str]
    sums: Tensor | None = None
    """(layout.numel,), of the gradients that the optimizer saw."""
    norms: list[Tensor] = field(default_factory=list)
    """Probe of those gradients: fp64 L1 norms."""

    @classmethod
    def plan(
        cls, table: AxisTable, shapes: dict[str, tuple[int, ...]], held_masters: Iterable[tuple[Tensor, MasterSlice]]
    ) -> Count:
        """Args:
        shapes: of the parameters today.
        held_masters: from `resize.held_masters`.
        """
        layout = ScoreLayout(table)
        segments: dict[Tensor, list[Segment]] = {}
        probes: dict[Tensor, list[MasterSlice]] = {}
        for master, held in held_masters:
            of_master = segments.setdefault(master, [])
            if target := layout.target(held.name, shapes[held.name]):
                of_master.append(_segment(held, target))
            if len(shapes[held.name]) == 1:
                probes.setdefault(master, []).append(held)
        tables = {master: SegmentTable(found, master.numel()) for master, found in segments.items()}
        names = {name for name, shape in shapes.items() if len(shape) == 1}
        return cls(table, layout, tables, probes, names)

    def begin(self) -> None:
        """Forget what an earlier step counted."""
        device = next(iter(self.segments)).device if self.segments else torch.device("cpu")
        self.sums, self.norms = torch.zeros(self.layout.numel, device=device), []

    def probe(self, master: Tensor, gradient: Tensor) -> None:
        flat = gradient.flatten()
        views = [flat[held.position :][: held.numel] for held in self.probes.get(master, ())]
        self.norms += l1_norms(views)


def _segment(held: MasterSlice, target: Target) -> Segment:
    return Segment(held.position, held.numel, held.start, target.columns, target.rows_at, target.columns_at)


def l1_norms(tensors: list[Tensor]) -> list[Tensor]:
    """In fp64: the factor between two of them is to be exact to fp32. Few launches for many tensors."""
    return list(torch._foreach_norm(tensors, 1, dtype=torch.float64)) if tensors else []


class CountingAdamW(torch.optim.AdamW):
    """torch's AdamW (fused), with its states; `count` makes the next step count."""

    def __init__(self, groups: list[dict], **options) -> None:
        super().__init__(groups, fused=True, **options)
        self.counted: Count | None = None
        self._due: dict[Tensor, SegmentTable] = {}

    def count(self, count: Count) -> None:
        """The next update of every tensor in `count` adds its scores there: once, and not at all in a skipped step."""
        count.begin()
        self.counted, self._due = count, dict(count.segments)

    @torch.no_grad()
    def step(self, closure=None):
        if not self._due:  # DeepSpeed calls step before there are any gradients, and once a group
            return super().step(closure)
        for group in self.param_groups:
            self._step_group(group)
        return None

    def _step_group(self, group: dict) -> None:
        params, gradients, exp_avgs, exp_avg_sqs, steps = ([] for _ in range(5))
        self._init_group(group, params, gradients, exp_avgs, exp_avg_sqs, [], steps)
        if not params:
            return
        torch._foreach_add_(steps, 1)
        settings = AdamSettings(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        rest = []
        for tensors in zip(params, gradients, exp_avgs, exp_avg_sqs, steps, strict=True):
            table = self._due.pop(tensors[0], None)
            if table is None:
                rest.append(tensors)
                continue
            self.counted.probe(tensors[0], tensors[1])
            adamw_with_sums_(*tensors, settings, table, self.counted.sums)
        if rest:
            fused_adamw_(*map(list, zip(*rest, strict=True)), settings)
