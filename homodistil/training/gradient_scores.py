"""One step's importance, before the step or within it: what the trainer calls at the accumulation boundary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from homodistil.engine.counting_adamw import Count, CountingAdamW, l1_norms
from homodistil.models.axes import AxisTable, Keep
from homodistil.pruning.importance import Importance
from homodistil.resize import base_optimizer, gradient_fragments, held_masters

Measurement = Callable[[], Keep]
"""Sums by axis, alike on all ranks. To be called once the step has been applied, by every rank."""


def measure_importance(
    engine, importance: Importance, table: AxisTable, shapes: dict[str, tuple[int, ...]]
) -> Measurement:
    """Call between `backward` at the boundary and `engine.step`: only there are gradients reduced and unclipped.

    Args:
        table: axes at their widths of today.
        shapes: of the parameters today.
    """
    optimizer = base_optimizer(engine)
    if importance.needs_gradients and isinstance(optimizer, CountingAdamW):
        return _within_step(engine, optimizer, importance, table, shapes)
    scored = {use.parameter for use in table.uses if use.scored}
    sums = importance.measure(gradient_fragments(engine, scored), table, shapes)
    return lambda: sums


def _within_step(
    engine, optimizer: CountingAdamW, importance: Importance, table: AxisTable, shapes: dict[str, tuple[int, ...]]
) -> Measurement:
    count = optimizer.counted
    if count is None or count.table != table:  # the first step, or the first one after an event
        count = Count.plan(table, shapes, held_masters(engine))
    before = _total(l1_norms([fragment.gradient for fragment in gradient_fragments(engine, count.probe_names)]))
    optimizer.count(count)

    def sums() -> Keep:
        probes = torch.stack([before, _total(count.norms)]).to(count.sums.device, torch.float32)
        return importance.over_ranks(count.layout, count.sums, probes)

    return sums


def _total(norms: list[Tensor]) -> Tensor:
    return torch.stack(norms).sum() if norms else torch.zeros((), dtype=torch.float64)
