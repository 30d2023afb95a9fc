"""When widths fall in a closed loop (pruning.schedule=gap): as fast as a bound on the rise of the KL allows.

All axes move together over "stops", the widths that a straight line from the first to the target widths passes. At
every interval the controller looks for the furthest stop whose cut, tried on a copy of the student, raises the KL to
the teacher by no more than the bound. While the widths are ahead of a straight line to the target, the next event waits
until training has recovered its share of the last rise. Behind that line it does not wait: early in training the KL
rises by training alone and never returns to its value at the first event.

Milestones are stops that no event passes by. While one is held, the controller's clock stands still: everything below
that counts steps counts those of the clock, so that the end is where it would be without.

A deadline stands behind it: the student must not be wider than one from which the events that are left still reach the
target, and from half time on must not fall behind a straight line from there. The first condition alone would end in a
few cuts of the largest size allowed, which damage the student.

Pure logic: what it measures comes in as numbers and as a function, the same on all ranks; so are its decisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from homodistil.config.schema import PruningConfig
from homodistil.models.axes import Widths
from homodistil.pruning.milestones import Milestone, Route
from homodistil.pruning.schedule import (
    arrivals,
    events_needed,
    multiple_of,
    narrowest_after,
    unreachable,
    walking_steps,
    widest_before,
)
from homodistil.pruning.schedule_protocol import Decision, Look

NUM_TRIALS = 5
"""Cuts tried at one interval (one more where the deadline's own cut must be known)."""

Trial = Callable[[dict[str, int]], float]
"""Axis -> new width for the axes that would change; gives the KL to the teacher after that cut (nats)."""


@dataclass
class GapState:
    """What a checkpoint holds; JSON-able."""

    looked: int = 0
    """Update after which the controller has looked last."""
    size: int = 0
    """Stops to try first; 0: none tried yet."""
    rise: float = 0.0
    """Rise of the KL at the last event (nats)."""
    kl_after: float = 0.0
    """KL right after the last event."""
    num_events: int = 0
    above_bound: list[int] = field(default_factory=list)
    """Updates after which an event broke the bound."""
    arrived: list[int] = field(default_factory=list)
    """Updates after which an event has reached a milestone on the way, widest first."""


class GapSchedule:
    """The closed loop (a `schedule_protocol.Schedule`).

    Args:
        initial, target: widths before and after; axes absent from `target` stay.
        config: bound, recovery, fractions, interval, multiples, largest event.
        steps: optimizer steps of the run.
        route: milestones, and how long each is held.

    Raises:
        UserError: not even the largest cuts allowed reach the target, or a milestone, in time.
    """

    def __init__(
        self, initial: Widths, target: Widths, config: PruningConfig, steps: int, route: Route | None = None
    ) -> None:
        self.config, self.target, self.route, self._num_steps = config, dict(target), route or Route(), steps
        self.table: dict[int, dict[str, int]] = {}  # nothing is known beforehand
        start_step, self.steps = walking_steps(config, steps, self.route, target)
        self.milestones = self.route.on_the_way(target)
        self.end_step = self.steps[-1] + len(self.milestones) * self.route.settle_steps
        legs = [dict(initial), *(m.widths for m in self.milestones), self.target]
        if self.milestones:
            arrivals(legs, self.steps, start_step, config)  # there are events enough
        self.stops, self._milestone_stops = leg_stops(legs, self.target, config)
        self.limits = {axis: self._limits(axis, legs) for axis in target}
        self.state = GapState(looked=start_step)

    @property
    def num_events(self) -> int:
        """The most there can be."""
        return len(self.steps)

    def is_due(self, step: int, widths: Widths) -> bool:
        """Whether to look for an event after update `step`. An interval that fell on skipped updates is made up."""
        if all(widths[axis] <= width for axis, width in self.target.items()) or self._is_held(step):
            return False
        now = self._clock(step)
        return now >= self.steps[-1] or any(self.state.looked < at <= now for at in self.steps)

    def choose(self, step: int, widths: Widths, look: Look) -> Decision | None:
        return self.decide(step, widths, look.kl(), look.kl_after)

    def decide(self, step: int, widths: Widths, kl: float, trial: Trial) -> Decision | None:
        """The event after update `step`, or None.

        Args:
            widths: of today.
            kl: to the teacher today, nats; like what `trial` gives the same on all ranks.
        """
        now = self.state.looked = self._clock(step)
        here, floor = self._position(widths), self._floor(now)
        is_late, must_wait = floor > here, here >= self._line(now, 1) and self._is_recovering(kl)
        floor = min(floor, self._next_milestone(here))
        if must_wait and not is_late:
            return None
        tried = _Tried(lambda stop: trial(self._cut(widths, stop)) - kl, self.config.gap_bound)
        furthest = None if must_wait else self._search(here, max(floor, here + 1), self._furthest(widths, here), tried)
        if furthest is None and not is_late:
            return None
        forced = furthest is None and (must_wait or not tried.fits(floor))
        decision = Decision(self._cut(widths, floor if furthest is None else furthest), forced, len(tried.rises))
        self._note_arrival(step, {**widths, **decision.widths})
        return decision

    def after_event(self, step: int, kl_before: float, kl_after: float, forced: bool) -> dict[str, object]:
        """Take in what the event did; returns what its line in events.jsonl tells."""
        rise, bound = kl_after - kl_before, self.config.gap_bound
        kept = rise <= bound
        state = self.state
        state.rise, state.kl_after, state.num_events = rise, kl_after, state.num_events + 1
        if not kept:
            state.above_bound.append(step)
        return {"gap_rise": rise, "gap_bound": bound, "gap_bound_kept": kept, "gap_forced": forced}

    def summary(self) -> dict[str, object]:
        """For the row of the result table."""
        return {"gap_events": self.state.num_events, "gap_events_above_bound": list(self.state.above_bound)}

    def report(self) -> str:
        """One line for the end of the run."""
        late = self.state.above_bound
        where = f"all but {len(late)}, after updates {', '.join(map(str, late))}" if late else "all"
        return (
            f"closed loop: {self.state.num_events} events; {where}, kept the KL's rise within pruning.gap_bound = "
            f"{self.config.gap_bound:g}"
        )

    def describe(self) -> str:
        bound = self.config.gap_bound
        return f"as fast as pruning.gap_bound={bound:g} allows, by step {self.end_step} at the latest"

    def state_dict(self) -> dict:
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = GapState(**state)

    # -- milestones

    def milestone_due(self, step: int, widths: Widths) -> Milestone | None:
        """The milestone that is to be exported after update `step` by a student of these widths."""
        for at, milestone in zip(self.state.arrived, self.milestones, strict=False):
            if step >= at + self.route.settle_steps and milestone.widths == dict(widths):
                return milestone
        final = self.route.at_the_end(self.target)
        return final if final and step == self._num_steps and final.widths == dict(widths) else None

    def _is_held(self, step: int) -> bool:
        return bool(self.state.arrived) and step <= self.state.arrived[-1] + self.route.settle_steps

    def _clock(self, step: int) -> int:
        """Updates done without those for which milestones were held. Not asked for while one is."""
        return step - len(self.state.arrived) * self.route.settle_steps

    def _note_arrival(self, step: int, widths: Widths) -> None:
        passed = len(self.state.arrived)
        if passed < len(self.milestones) and widths == self.milestones[passed].widths:
            self.state.arrived.append(step)

    def _next_milestone(self, here: int) -> int:
        """First stop beyond `here` that no event passes by."""
        return next((stop for stop in self._milestone_stops if stop > here), len(self.stops) - 1)

    # -- stops

    def _limits(self, axis: str, legs: list[Widths]) -> list[int]:
        """Widest axis with 0, 1, 2, ... events left."""
        config, multiple = self.config, multiple_of(axis, self.config)
        widest = [self.target[axis]]
        pairs = list(zip(legs, legs[1:], strict=False))
        for wide, narrow in reversed(pairs):
            # All axes reach a milestone with the same event, so that the slowest one decides when.
            is_first = wide is legs[0]
            count = len(self.steps) + 1 - len(widest) if is_first else events_needed(wide, narrow, config)
            for _ in range(count):
                widest.append(widest_before(widest[-1], multiple, config.max_event_fraction, wide[axis]))
        if legs[0][axis] > widest[-1]:
            raise unreachable(axis, legs[0][axis], self.target[axis], len(self.steps), config)
        return widest

    def _position(self, widths: Widths) -> int:
        """Last stop that no axis is behind."""
        reached = (all(widths[axis] <= width for axis, width in stop.items()) for stop in self.stops)
        return sum(reached) - 1

    def _floor(self, step: int) -> int:
        """First stop that does not miss the deadline after update `step`."""
        left = sum(at > step for at in self.steps)
        is_wide = (any(width > self.limits[axis][left] for axis, width in stop.items()) for stop in self.stops)
        return max(sum(is_wide), self._line(step, 2))

    def _line(self, step: int, slope: int) -> int:
        """Stop to reach after update `step` on a straight line that ends at the target, and begins at the start (slope
        1) or at half time (2)."""
        left = sum(at > step for at in self.steps)
        return int(max(0.0, 1 - slope * left / len(self.steps)) * (len(self.stops) - 1))

    def _is_recovering(self, kl: float) -> bool:
        state = self.state
        return state.num_events > 0 and kl > state.kl_after - self.config.gap_recovery * state.rise

    def _furthest(self, widths: Widths, here: int) -> int:
        """Last stop that one event may lead to, with the largest cut that an axis allows."""
        narrowest = {axis: self._narrowest(axis, widths[axis]) for axis in self.target}
        allowed = (all(width >= narrowest[axis] for axis, width in stop.items()) for stop in self.stops)
        return min(max(here + 1, sum(allowed) - 1), self._next_milestone(here))

    def _narrowest(self, axis: str, width: int) -> int:
        return narrowest_after(width, self.target[axis], multiple_of(axis, self.config), self.config.max_event_fraction)

    def _cut(self, widths: Widths, stop: int) -> dict[str, int]:
        """The axes that change on the way to `stop`: as far as one event may go, which is further than any waits."""
        wanted = {axis: max(width, self._narrowest(axis, widths[axis])) for axis, width in self.stops[stop].items()}
        return {axis: width for axis, width in wanted.items() if width < widths[axis]}

    def _search(self, here: int, low: int, high: int, tried: _Tried) -> int | None:
        """The furthest stop in [low, high] found to keep the bound: twice as far while it holds, then by halves.

        The rise need not grow with the cut: only a stop that has itself been tried is returned.
        """
        high = max(low, high)
        # For example here = 10, size 4: try 14; it fits: 18; it does not: halves between 14 and 18, that is 16, then
        # 17.
        size = self.state.size or -(-(len(self.stops) - 1) // len(self.steps))
        best, limit, guess = None, high, min(max(low, here + size), high)
        while low <= high and len(tried.rises) < NUM_TRIALS:
            size = guess - here
            if tried.fits(guess):
                best, low = guess, guess + 1
            else:
                high = guess - 1
            guess = min(here + 2 * size, high) if high == limit else (low + high) // 2
        self.state.size = max(1, size // 2 if best is None else best - here)
        return best


@dataclass
class _Tried:
    """Rises of the KL by stop, each measured once."""

    measure: Callable[[int], float]
    bound: float
    rises: dict[int, float] = field(default_factory=dict)

    def fits(self, stop: int) -> bool:
        if stop not in self.rises:
            self.rises[stop] = self.measure(stop)
        return self.rises[stop] <= self.bound  # never, when it is not a number


def leg_stops(legs: list[Widths], target: Widths, config: PruningConfig) -> tuple[list[dict[str, int]], list[int]]:
    """The stops of the way along `legs` (its start, milestones and end), and which of them are milestones."""
    stops, milestones = [{axis: legs[0][axis] for axis in target}], []
    for wide, narrow in zip(legs, legs[1:], strict=False):
        stops += width_stops(wide, {axis: narrow[axis] for axis in target}, config)[1:]
        milestones.append(len(stops) - 1)
    return stops, milestones[:-1]


def width_stops(initial: Widths, target: Widths, config: PruningConfig) -> list[dict[str, int]]:
    """Widths on a straight line from `initial` (the first stop) to `target` (the last), rounded to multiples."""
    changes: dict[float, dict[str, int]] = {}
    for axis in target:
        for progress, width in _axis_stops(initial[axis], target[axis], multiple_of(axis, config)):
            changes.setdefault(progress, {})[axis] = width
    stops = [{axis: initial[axis] for axis in target}]
    for progress in sorted(changes):
        stops.append(stops[-1] | changes[progress])
    return stops


def _axis_stops(initial: int, target: int, multiple: int) -> list[tuple[float, int]]:
    """(progress in (0, 1), width from there on): a width begins where the line comes nearest to it."""
    grid = [initial, *range((initial - 1) // multiple * multiple, target, -multiple), target]
    pairs = zip(grid, grid[1:], strict=False)
    return [((initial - (wide + narrow) / 2) / (initial - target), narrow) for wide, narrow in pairs if narrow < wide]
