"""From "which width is due" to a resize plan: schedule, importance and selection put together.

`due` is None nearly always; otherwise the plan that `resize/` applies and that everything numbered by neurons
(scores, projections, head maps) follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from homodistil.models.axes import AxisTable, Keep
from homodistil.pruning.importance import Importance
from homodistil.pruning.schedule import WidthSchedule
from homodistil.pruning.selection import select
from homodistil.resize.plan import ResizePlan, make_plan


class Pruner:
    """Args:
    schedule: path of every axis.
    importance: smoothed scores.
    protected: residual dims of the teacher that never go, int64 (k,).
    """

    def __init__(self, schedule: WidthSchedule, importance: Importance, protected: Tensor) -> None:
        self.schedule, self.importance, self.protected = schedule, importance, protected

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of update `step` still decide anything."""
        return step <= self.schedule.end_step

    def accept(self, sums: Keep) -> None:
        """One step's sums (Importance.measure), once the step has been applied."""
        self.importance.accept(sums)

    def due(self, step: int, table: AxisTable, kept_hidden: Tensor) -> ResizePlan | None:
        """The plan for after update `step`, or None. Not to be asked after an update that was skipped.

        An event that fell on skipped updates is still due at the next one: what counts is the width that the schedule
        has reached.

        Args:
            table: axes at their widths of today.
            kept_hidden: teacher index of each residual dim of today, (hidden,).
        """
        due = {axis: width for axis, width in self.schedule.reached(step).items() if width < table.widths[axis]}
        if not due:
            return None
        protected = torch.isin(kept_hidden, self.protected).nonzero().squeeze(1)
        return make_plan(table, select(self.importance.scores(), due, protected))

    def after_resize(self, plan: ResizePlan) -> None:
        self.importance.narrow(plan.keep)

    def state_dict(self) -> dict:
        return {"importance": self.importance.state_dict(), "protected": self.protected}

    def load_state_dict(self, state: dict) -> None:
        self.importance.load_state_dict(state["importance"])
        self.protected = state["protected"]
