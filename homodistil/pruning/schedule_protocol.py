"""What every pruning schedule answers, whether its events are known before training or found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from homodistil.models.axes import Widths
from homodistil.pruning.milestones import Milestone, Route


@dataclass(frozen=True)
class Decision:
    """An event: axes that change, and why."""

    widths: dict[str, int]
    """Axis -> new width."""
    forced: bool = False
    """The deadline asked for it: the pause or the bound would not have. Never where events are known beforehand."""
    num_trials: int = 0


class Look(Protocol):
    """The gap to the teacher at one moment, and what cuts would make of it. The same on all ranks; every rank asks."""

    def kl(self) -> float:
        """KL to the teacher on the probe now (nats)."""

    def kl_after(self, due: Widths) -> float:
        """The KL after axes have been cut to the widths `due`, which is only tried."""


class Schedule(Protocol):
    """When widths fall. The same on all ranks, which all ask the same."""

    target: dict[str, int]
    """Axis -> its last width."""
    route: Route
    """Milestones on the way, and how long each is held."""
    end_step: int
    """Update after which nothing is cut any more."""
    table: Mapping[int, Mapping[str, int]]
    """What is known before training: update -> axis -> new width. Empty where the events are found on the way."""

    @property
    def num_events(self) -> int:
        """The most there can be."""

    def is_due(self, step: int, widths: Widths) -> bool:
        """Whether `choose` is to be asked after update `step`. `widths`: the current ones, by axis."""

    def choose(self, step: int, widths: Widths, look: Look) -> Decision | None:
        """The event after update `step`, for which `is_due` was true; None: there is none after all."""

    def after_event(self, step: int, kl_before: float, kl_after: float, forced: bool) -> dict[str, object]:
        """Record what the event did to the KL (nats); returns further entries of its line in events.jsonl."""

    def milestone_due(self, step: int, widths: Widths) -> Milestone | None:
        """The milestone that is to be exported after update `step` by a student of these widths."""

    def describe(self) -> str:
        """When the events are, in words, for the summary before the run."""

    def summary(self) -> dict[str, object]:
        """What the row of the result table gets in addition."""

    def report(self) -> str:
        """One line for the end of the run, empty if there is nothing to report."""

    def state_dict(self) -> dict:
        """What a checkpoint has to hold, JSON-able; empty where everything follows from the config."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned."""
