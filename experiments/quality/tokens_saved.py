"""How many tokens a method needs to reach the loss of another: it is trained longer, each time with a whole schedule.

A run of twice the steps is a run of its own, whose learning rate falls to 0 at its end; the loss on the way of a
longer run would be that of a rate that is still high. Between two lengths the loss is taken as linear in their
logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log

from experiments.quality.comparison import Entry, job
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from homodistil.training.heldout_scores import language_loss

LENGTHS = (2, 4)
"""Times the steps of the study, tried in turn until the loss is reached."""


@dataclass
class Reach:
    """A method on its way to a loss, on the first seed and the TEST half."""

    entry: Entry
    target: float
    """The loss to reach, nats."""
    tokens: int
    """That the method to be reached has been trained on."""
    losses: dict[int, float] = field(default_factory=dict)
    """Length (1: as the study) -> held-out loss."""

    @property
    def factor(self) -> float | None:
        """Tokens needed over `tokens`; 1 where as many (or fewer) do, None where the longest run is not enough."""
        reached = [length for length, loss in sorted(self.losses.items()) if loss <= self.target]
        if not reached:
            return None
        longer = reached[0]
        shorter = max((length for length in self.losses if length < longer), default=longer)
        if shorter == longer:
            return float(longer)
        share = (self.losses[shorter] - self.target) / (self.losses[shorter] - self.losses[longer])
        return exp(log(shorter) + share * log(longer / shorter))

    @property
    def in_words(self) -> str:
        """The factor as a cell of a table."""
        if not self.losses:
            return "-"
        if self.factor is None:
            return f"> {max(self.losses)}"
        return "<= 1" if self.factor == 1 else f"{self.factor:.2f}"


def run(pool: Pool, options: Options, peers: list[Entry], reference: Entry) -> list[Reach]:
    """The longer runs of every peer that has not reached the reference's loss yet; none where that was not trained."""
    seed = options.seeds[0]
    ours = reference.runs.get(seed)
    if ours is None:
        return []
    target = language_loss(ours["test"])
    courses = [Reach(peer, target, ours["tokens"]) for peer in peers if seed in peer.runs]
    for course in courses:
        course.losses[1] = language_loss(course.entry.runs[seed]["test"])
    for length in LENGTHS:
        waiting = [course for course in courses if course.factor is None]
        jobs = [job(options, course.entry, course.entry.rate, seed, length=length) for course in waiting]
        for course, measured in zip(waiting, pool.run(f"{length} x the tokens", jobs), strict=True):
            if measured:
                course.losses[length] = language_loss(measured["test"])
    return courses
