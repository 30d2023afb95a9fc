"""When widths fall: keep ratio over steps (HomoDistil, cubic schedule), rounded to widths and bounded event sizes.

Pure functions and one table, made before training: the whole path of every axis is known, and refused if it cannot be
walked, before step 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from homodistil.config.schema import PruningConfig
from homodistil.errors import UserError
from homodistil.models.axes import Widths, kind_of
from homodistil.models.rotary_pairs import width_multiple
from homodistil.pruning.milestones import Milestone, Route
from homodistil.pruning.schedule_protocol import Decision, Look


def keep_ratio(kind: str, step: float, start_step: float, end_step: float, final_ratio: float) -> float:
    """Fraction of an axis that is left after `step` updates: 1 until start_step, `final_ratio` from end_step on.

    cubic: r_f + (1 - r_f) * (1 - (t - t_i) / (t_f - t_i))^3 (HomoDistil, section 3; Zhu & Gupta 2017); linear: the
    same without the power.
    """
    if step >= end_step:
        return final_ratio
    if step <= start_step:
        return 1.0
    remaining = 1.0 - (step - start_step) / (end_step - start_step)
    return final_ratio + (1.0 - final_ratio) * remaining ** {"cubic": 3, "linear": 1}[kind]


def event_steps(start_step: int, end_step: int, interval_steps: int) -> list[int]:
    """Updates (counted from 1) after which widths may change: every multiple of the interval, and end_step itself."""
    end_step = max(end_step, start_step + 1)
    grid = range((start_step // interval_steps + 1) * interval_steps, end_step, interval_steps)
    return [*grid, end_step]


def width_path(ratios: list[float], initial: int, target: int, multiple: int, max_event_fraction: float) -> list[int]:
    """Widths after each event: nearest multiple to ratio * initial, never rising, ending exactly on target.

    A cut larger than `max_event_fraction` is spread over the events before it. One `multiple` is always allowed,
    since no finer cut exists.

    Raises:
        ValueError: not even the largest cuts allowed reach the target in this many events.
    """
    widest = [float(target)]  # from which the rest of the events still reaches the target, last event first
    for _ in ratios:
        widest.append(widest_before(int(widest[-1]), multiple, max_event_fraction, initial))
    if initial > widest[-1]:
        raise ValueError(f"{initial} to {target} in {len(ratios)} events")
    path, width = [], initial
    for ratio, limit in zip(ratios, reversed(widest[:-1]), strict=True):
        wanted = round(ratio * initial / multiple) * multiple
        narrowest = narrowest_after(width, target, multiple, max_event_fraction)
        width = max(narrowest, target, min(wanted, int(limit), width))
        path.append(width)
    return path


def narrowest_after(width: int, target: int, multiple: int, max_event_fraction: float) -> int:
    """Narrowest axis that one event may leave of `width`."""
    # The small numbers keep 1e-16 of rounding from costing a whole entry, as in ceil(10 * (1 - 0.7)) = 4.
    by_fraction = math.ceil(width * (1 - max_event_fraction) - 1e-9)
    rounded_up = -(-by_fraction // multiple) * multiple
    return max(target, min(by_fraction if by_fraction <= target else rounded_up, (width - 1) // multiple * multiple))


def widest_before(width: int, multiple: int, max_event_fraction: float, initial: int) -> int:
    """Widest axis, a multiple or `initial`, that one event may bring down to `width`."""
    by_fraction = initial if max_event_fraction >= 1 else math.floor(width / (1 - max_event_fraction) + 1e-9)
    # One step of the multiple is always allowed, however small the fraction: width 10, multiple 8: 16 may become 10.
    widest = max(by_fraction, (width // multiple + 1) * multiple)
    return initial if initial <= widest else max(width, widest // multiple * multiple)


class WidthSchedule:
    """The path of every axis, known before training (a `schedule_protocol.Schedule`).

    With milestones the way is walked in legs: each ends exactly on a milestone's widths, near where the curve would
    have passed them, and the widths are then held for `settle_steps`. The curve stands still meanwhile, and is walked
    in the steps that are left, so that the last event is where it would be without: at end_fraction.

    Args:
        initial, target: widths before and after; axes absent from `target` stay.
        config: schedule, fractions, interval, multiples, largest event.
        steps: optimizer steps of the run.
        route: milestones, and how long each is held.

    Raises:
        UserError: the target, or a milestone, cannot be reached in time.
    """

    def __init__(
        self, initial: Widths, target: Widths, config: PruningConfig, steps: int, route: Route | None = None
    ) -> None:
        self.config, self.initial, self.target = config, dict(initial), dict(target)
        self.route, self._num_steps = route or Route(), steps
        self.table: dict[int, dict[str, int]] = {}
        self.arrivals: dict[int, Milestone] = {}
        """Update after which an event reaches a milestone on the way -> that milestone."""
        self.end_step = 0
        if config.schedule == "none":
            return
        if config.schedule == "one_shot":
            self.table = {0: {axis: width for axis, width in target.items() if width < initial[axis]}}
            return
        self._walk(config, steps)

    def _walk(self, config: PruningConfig, steps: int) -> None:
        start_step, at = walking_steps(config, steps, self.route, self.target)
        milestones = self.route.on_the_way(self.target)
        stops = [self.initial, *(m.widths for m in milestones), self.target]
        ends = arrivals(stops, at, start_step, config)
        first = 0
        for held, (wide, narrow, end) in enumerate(zip(stops, stops[1:], ends, strict=False)):
            events = at[first : end + 1]
            for axis in self.target:
                self._add_leg(axis, wide[axis], narrow[axis], events, (start_step, at[-1], held), config)
            if held < len(milestones):
                self.arrivals[at[end] + held * self.route.settle_steps] = milestones[held]
            first = end + 1
        self.end_step = at[-1] + len(milestones) * self.route.settle_steps

    def _add_leg(
        self, axis: str, wide: int, narrow: int, events: list[int], curve: tuple[int, int, int], config: PruningConfig
    ) -> None:
        """`events`: steps of the curve; `curve`: its first and last step, and how often it has stood still before."""
        start_step, end_step, held = curve
        initial, target = self.initial[axis], self.target[axis]
        scale = initial / wide  # exactly 1 without milestones
        ratios = [keep_ratio(config.schedule, t, start_step, end_step, target / initial) * scale for t in events]
        try:
            path = width_path(ratios, wide, narrow, multiple_of(axis, config), config.max_event_fraction)
        except ValueError:
            raise unreachable(axis, wide, narrow, len(events), config) from None
        previous = wide
        for step, width in zip(events, path, strict=True):
            if width < previous:
                self.table.setdefault(step + held * self.route.settle_steps, {})[axis] = width
            previous = width

    def reached(self, step: int, widths: Widths | None = None) -> dict[str, int]:
        """Axis -> width after update `step`, for the axes that have changed by then.

        Args:
            widths: of today: where skipped updates have made a milestone late, the way goes there first.
        """
        now: dict[str, int] = {}
        for at in sorted(self.table):
            if at > step:
                break
            now |= self.table[at]
            if widths and at in self.arrivals and any(widths[axis] > width for axis, width in now.items()):
                break
        return now

    def is_due(self, step: int, widths: Widths) -> bool:
        return bool(self._left(step, widths))

    def choose(self, step: int, widths: Widths, look: Look | None = None) -> Decision | None:
        """Nothing has to be tried: `look` is not asked."""
        due = self._left(step, widths)
        return Decision(due) if due else None

    def _left(self, step: int, widths: Widths) -> dict[str, int]:
        """An event that fell on skipped updates is still due: what counts is the width that has been reached."""
        now = self.reached(step, widths)
        return {axis: width for axis, width in now.items() if axis in widths and width < widths[axis]}

    def after_event(self, step: int, kl_before: float, kl_after: float, forced: bool) -> dict[str, object]:
        return {}

    def milestone_due(self, step: int, widths: Widths) -> Milestone | None:
        """The milestone that is to be exported after update `step` by a student of these widths."""
        for at, milestone in self.arrivals.items():
            if step >= at + self.route.settle_steps and milestone.widths == dict(widths):
                return milestone
        final = self.route.at_the_end(self.target)
        return final if final and step == self._num_steps and final.widths == dict(widths) else None

    @property
    def num_events(self) -> int:
        return len(self.table)

    def describe(self) -> str:
        stages = self.config.one_shot_stages
        if self.config.schedule == "one_shot":
            return "all before step 1" + (f", in {stages} stages" if stages > 1 else "")
        return (
            f"{self.num_events} events in steps {min(self.table)} to {max(self.table)}, "
            f"{self.config.interval_steps} steps apart or more"
        )

    def summary(self) -> dict[str, object]:
        return {}

    def report(self) -> str:
        return ""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Everything follows from the config."""


def stage_widths(initial: Widths, target: Widths, num_stages: int) -> list[dict[str, int]]:
    """Widths after each of `num_stages` cuts of (nearly) equal ratio; axes that a cut leaves alone are absent."""
    stages, now = [], dict(initial)
    for stage in range(1, num_stages + 1):
        share = stage / num_stages
        exact = {axis: initial[axis] ** (1 - share) * width**share for axis, width in target.items()}
        rounded = {axis: _to_multiple(width, width_multiple(axis, initial)) for axis, width in exact.items()}
        wanted = {axis: max(target[axis], width) for axis, width in rounded.items()}
        due = {axis: width for axis, width in wanted.items() if width < now[axis]}
        now |= due
        stages.append(due)
    return [due for due in stages if due]


def _to_multiple(width: float, multiple: int) -> int:
    return round(width / multiple) * multiple


def walking_steps(config: PruningConfig, steps: int, route: Route, target: Widths) -> tuple[int, list[int]]:
    """First step of the curve, and its events; it stands still while a milestone is held. Raises `UserError`."""
    start_step, end_step = round(config.start_fraction * steps), round(config.end_fraction * steps)
    num_held = len(route.on_the_way(target)) * route.settle_steps
    if num_held and end_step - num_held <= start_step:
        raise UserError(
            f"run.settle_steps: {route.settle_steps} for each of {len(route.on_the_way(target))} milestones is "
            f"{num_held} steps, and pruning has {end_step - start_step} (pruning.start_fraction to end_fraction of "
            f"train.steps); lower it, or raise pruning.end_fraction ({config.end_fraction:g})"
        )
    return start_step, event_steps(start_step, end_step - num_held, config.interval_steps)


def arrivals(stops: Sequence[Widths], at: list[int], start_step: int, config: PruningConfig) -> list[int]:
    """Index into `at` of the event with which each leg between `stops` ends: where the curve passes its end, moved only
    as far as the largest cuts that are allowed ask for.

    Raises:
        UserError: there are fewer events than the milestones ask for.
    """
    legs = list(zip(stops, stops[1:], strict=False))
    if len(legs) == 1:
        return [len(at) - 1]
    needed = [events_needed(wide, narrow, config) for wide, narrow in legs]
    if sum(needed) > len(at):
        raise UserError(
            f"run.export_milestones: passing all of them takes {sum(needed)} events of at most "
            f"{config.max_event_fraction:.0%} each, and there are {len(at)}; lower pruning.interval_steps "
            f"({config.interval_steps}) or run.settle_steps, raise pruning.end_fraction ({config.end_fraction}) or "
            f"pruning.max_event_fraction, or leave milestones out"
        )
    initial, target = stops[0]["hidden"], stops[-1]["hidden"]
    kind = "linear" if config.schedule == "gap" else config.schedule
    curve = [keep_ratio(kind, step, start_step, at[-1], target / initial) * initial for step in at]
    ends: list[int] = []
    for i, narrow in enumerate(stops[1:]):
        passed = next((j for j, hidden in enumerate(curve) if hidden <= narrow["hidden"] + 0.5), len(at) - 1)
        earliest, latest = (ends[-1] if ends else -1) + needed[i], len(at) - 1 - sum(needed[i + 1 :])
        ends.append(min(max(passed, earliest), latest))
    return [*ends[:-1], len(at) - 1]


def events_needed(wide: Widths, narrow: Widths, config: PruningConfig) -> int:
    """Fewest events that lead from widths to others, over all axes; at least 1."""
    most = 1
    for axis, width in narrow.items():
        count, reached = 0, width
        while reached < wide[axis]:
            reached = widest_before(reached, multiple_of(axis, config), config.max_event_fraction, wide[axis])
            count += 1
        most = max(most, count)
    return most


def unreachable(axis: str, initial: int, target: int, num_events: int, config: PruningConfig) -> UserError:
    """For a path that cannot be walked."""
    return UserError(
        f"pruning.max_event_fraction: {axis} cannot go from {initial} to {target} in {num_events} events of at most "
        f"{config.max_event_fraction:.0%} each; lower pruning.interval_steps ({config.interval_steps}), raise "
        f"pruning.end_fraction ({config.end_fraction}) or raise pruning.max_event_fraction"
    )


def multiple_of(axis: str, config: PruningConfig) -> int:
    """What widths of `axis` are multiples of on the way."""
    if axis == "hidden":
        return config.width_multiple
    if kind_of(axis) == "ffn":
        return config.ffn_multiple
    return config.head_dim_multiple if kind_of(axis) in ("qk_dim", "vo_dim", "head_norm") else 1
