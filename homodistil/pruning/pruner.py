"""From "which width is due" to "which neurons stay": schedule, importance and selection put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from homodistil.config.schema import PruningConfig
from homodistil.models.axes import Keep, Widths
from homodistil.models.resize_plan import ResizePlan
from homodistil.models.rotary_pairs import width_multiple
from homodistil.pruning.gap_schedule import GapSchedule
from homodistil.pruning.importance import Importance
from homodistil.pruning.milestones import NO_MILESTONES, Milestone, Route
from homodistil.pruning.pair_selection import select_dims
from homodistil.pruning.schedule import WidthSchedule
from homodistil.pruning.schedule_protocol import Look, Schedule
from homodistil.pruning.selection import select


def width_schedule(
    pruning: PruningConfig, num_steps: int, initial: Widths, target: Widths, route: Route = NO_MILESTONES
) -> Schedule:
    """The schedule of a run of `num_steps` optimizer steps. Raises `UserError` when the widths are out of reach.

    Args:
        route: milestones that it passes (`plan_route`).
    """
    kind = GapSchedule if pruning.schedule == "gap" else WidthSchedule
    multiples = [width_multiple(axis, initial) for axis, width in target.items() if width < initial[axis]]
    if 2 in multiples:  # rotary pairs
        pruning = replace(pruning, head_dim_multiple=math.lcm(2, pruning.head_dim_multiple))
    return kind(initial, target, pruning, num_steps, route)


class Pruner:
    """Decides which neurons go, and when.

    Args:
        schedule: when widths fall.
        importance: smoothed scores.
        protected: residual dims of the teacher that never go, int64 (k,).
    """

    def __init__(self, schedule: Schedule, importance: Importance, protected: Tensor) -> None:
        self.schedule, self.importance, self.protected = schedule, importance, protected
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

    def is_due(self, step: int, widths: Widths) -> bool:
        """Whether there may be an event after update `step`. Not to be asked after an update that was skipped.

        Args:
            widths: the student's current ones, by axis.
        """
        return self.schedule.is_due(step, widths)

    def due(
        self,
        step: int,
        widths: Widths,
        kept_hidden: Tensor,
        look: Look | None = None,
        kept_pairs: Tensor | None = None,
    ) -> Keep | None:
        """What stays of the axes that are cut after update `step`; None: no event. Every rank asks.

        Args:
            widths: the student's current ones, by axis.
            kept_hidden: teacher index of each current residual dim, (hidden,).
            look: asked only by a schedule that tries cuts.
            kept_pairs: origin of each rotary pair that is left, (pairs,); None: heads are not made of such.
        """
        decision = self.schedule.choose(step, widths, look)
        if decision is None:
            return None
        self._is_forced = decision.forced
        return self.keep_of(decision.widths, kept_hidden, kept_pairs)

    def keep_of(self, due: Widths, kept_hidden: Tensor, kept_pairs: Tensor | None = None) -> Keep:
        """What stays of axes that are cut to the widths `due`, by the current scores. The rest: as in `due`."""
        protected, scores = torch.isin(kept_hidden, self.protected).nonzero().squeeze(1), self.importance.scores()
        keep = select(scores, due, protected)
        if kept_pairs is None:
            return keep
        return keep | select_dims(scores, due, kept_pairs, self.schedule.target["layer.0.qk_dim"])

    def after_resize(self, plan: ResizePlan) -> None:
        self.importance.narrow(plan.keep)

    def keep_layers(self, kept: Sequence[int]) -> None:
        """Only the layers `kept` are left, renumbered in order."""
        self.importance.keep_layers(kept)

    def after_event(self, step: int, kl_before: float, kl_after: float) -> dict[str, object]:
        """Once the gap has been measured anew. Returns what the event's line tells beside."""
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
        schedule = self.schedule.state_dict()
        return state | ({"schedule": schedule} if schedule else {})

    def load_state_dict(self, state: dict) -> None:
        self.importance.load_state_dict(state["importance"])
        self.protected = state["protected"]
        self.may_rotate = state.get("may_rotate", True)
        if "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
