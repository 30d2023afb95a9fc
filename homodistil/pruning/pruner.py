"""From "which width is due" to a resize plan: schedule, importance and selection put together.

`due` is None nearly always; otherwise the plan that `resize/` applies and that everything numbered by neurons
(scores, projections, head maps) follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from homodistil.config.schema import PruningConfig
from homodistil.models.axes import AxisTable, Keep, Widths
from homodistil.models.resize_plan import ResizePlan, make_plan
from homodistil.pruning.gap_schedule import GapSchedule
from homodistil.pruning.importance import Importance
from homodistil.pruning.milestones import NO_MILESTONES, Milestone, Route
from homodistil.pruning.schedule import WidthSchedule
from homodistil.pruning.selection import select


class Look(Protocol):
    """The gap at one moment, and what cuts would make of it. The same on all ranks; every rank asks the same."""

    kl: float
    """KL to the teacher on the probe today (nats)."""

    def kl_after(self, keep: Keep) -> float:
        """The same after a cut, which is only tried."""


def width_schedule(
    pruning: PruningConfig, num_steps: int, initial: Widths, target: Widths, route: Route = NO_MILESTONES
) -> WidthSchedule | GapSchedule:
    """The schedule of a run of `num_steps` optimizer steps. Raises `UserError` when the widths are out of reach.

    Args:
        route: milestones that it passes (`plan_route`).
    """
    kind = GapSchedule if pruning.schedule == "gap" else WidthSchedule
    return kind(initial, target, pruning, num_steps, route)


class Pruner:
    """Args:
    schedule: path of every axis.
    importance: smoothed scores.
    protected: residual dims of the teacher that never go, int64 (k,).
    """

    def __init__(self, schedule: WidthSchedule | GapSchedule, importance: Importance, protected: Tensor) -> None:
        self.schedule, self.importance, self.protected = schedule, importance, protected
        self.look: Callable[[], Look] | None = None
        """The closed loop's eyes, there once an engine is."""
        self.rescore: Callable[[int], None] | None = None
        """Updates done -> fresh scores just before an event, for an importance that training gives no gradients for."""
        self.may_rotate = True
        """False: what compensation=full rotates would cost too much (training/compensated_events.py). A checkpoint
        remembers it."""
        self._is_forced = False

    @property
    def fixed(self) -> Tensor | None:
        """Residual dims that a rotation leaves alone; None: there is to be none at all."""
        return self.protected if self.may_rotate else None

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of update `step` still decide anything."""
        return self.importance.uses_training and step <= self.schedule.end_step

    def accept(self, sums: Keep) -> None:
        """One step's sums (Importance.measure), once the step has been applied."""
        self.importance.accept(sums)

    def due(self, step: int, table: AxisTable, kept_hidden: Tensor) -> ResizePlan | None:
        """The plan for after update `step`, or None. Not to be asked after an update that was skipped.

        Args:
            table: axes at their widths of today.
            kept_hidden: teacher index of each residual dim of today, (hidden,).
        """
        keep = self.due_keep(step, table, kept_hidden)
        return make_plan(table, keep) if keep else None

    def due_keep(self, step: int, table: AxisTable, kept_hidden: Tensor) -> Keep | None:
        """What stays of the axes that are due. Args as in `due`."""
        if isinstance(self.schedule, GapSchedule):
            return self._found_by_looking(self.schedule, step, table, kept_hidden)
        # An event that fell on skipped updates is still due: what counts is the width that the schedule has reached.
        reached = self.schedule.reached(step, table.widths)
        due = {axis: width for axis, width in reached.items() if width < table.widths[axis]}
        if not due:
            return None
        self._rescore(step)
        return self.keep_of(due, kept_hidden)

    def keep_of(self, due: Widths, kept_hidden: Tensor) -> Keep:
        """What stays of axes that are cut to the widths `due`, by the scores of now. `kept_hidden`: as in `due`."""
        protected = torch.isin(kept_hidden, self.protected).nonzero().squeeze(1)
        return select(self.importance.scores(), due, protected)

    def _found_by_looking(self, schedule: GapSchedule, step: int, table: AxisTable, kept_hidden: Tensor) -> Keep | None:
        if not schedule.looks(step, table.widths):
            return None
        self._rescore(step)
        look = self.look()
        decision = schedule.decide(
            step, table.widths, look.kl, lambda due: look.kl_after(self.keep_of(due, kept_hidden))
        )
        if decision is None:
            return None
        self._is_forced = decision.forced
        return self.keep_of(decision.widths, kept_hidden)

    def _rescore(self, step: int) -> None:
        if self.rescore and not self.importance.uses_training:
            self.rescore(step)

    def after_resize(self, plan: ResizePlan) -> None:
        self.importance.narrow(plan.keep)

    def after_event(self, step: int, kl_before: float, kl_after: float) -> dict[str, object]:
        """Once the gap has been measured anew. Returns what the event's line tells beside."""
        if not isinstance(self.schedule, GapSchedule):
            return {}
        return self.schedule.after_event(step, kl_before, kl_after, self._is_forced)

    def milestone_due(self, step: int, widths: Widths) -> Milestone | None:
        """What is to be exported after update `step` by a student of these widths; None nearly always."""
        return self.schedule.milestone_due(step, widths)

    def settle_steps(self, widths: Widths) -> int:
        """For how many steps these widths, which an event has led to, are held; 0 unless they are a milestone's."""
        on_the_way = self.schedule.route.on_the_way(self.schedule.target)
        return self.schedule.route.settle_steps if any(m.widths == dict(widths) for m in on_the_way) else 0

    def state_dict(self) -> dict:
        state = {"importance": self.importance.state_dict(), "protected": self.protected}
        state |= {} if self.may_rotate else {"may_rotate": False}
        closed_loop = isinstance(self.schedule, GapSchedule)
        return state | ({"schedule": self.schedule.state_dict()} if closed_loop else {})

    def load_state_dict(self, state: dict) -> None:
        self.importance.load_state_dict(state["importance"])
        self.protected = state["protected"]
        self.may_rotate = state.get("may_rotate", True)
        if isinstance(self.schedule, GapSchedule):
            self.schedule.load_state_dict(state["schedule"])
