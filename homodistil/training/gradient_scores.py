"""One step's importance: what the trainer calls at the accumulation boundary, between `backward` and `engine.step`."""

from __future__ import annotations

from homodistil.models.axes import AxisTable, Keep
from homodistil.pruning.importance import Importance
from homodistil.resize import gradient_fragments


def measure_importance(engine, importance: Importance, table: AxisTable, shapes: dict[str, tuple[int, ...]]) -> Keep:
    """Scores of this step by axis, alike on all ranks. Every rank calls it, there and only there: earlier the gradients
    are not reduced yet, later they are clipped or freed. Nothing is taken in before `importance.accept`.

    Args:
        table: axes at their widths of today.
        shapes: of the parameters today.
    """
    scored = {use.parameter for use in table.uses if use.scored}
    return importance.measure(gradient_fragments(engine, scored), table, shapes)
