"""When widths fall: keep ratio over steps (HomoDistil, cubic schedule), rounded to widths and bounded event sizes.

Pure functions and one table, made before training: the whole path of every axis is known, and refused if it cannot be
walked, before step 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from homodistil.config import PruningConfig
from homodistil.errors import UserError
from homodistil.models.axes import Widths


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
    by_fraction = math.ceil(width * (1 - max_event_fraction) - 1e-9)
    rounded_up = -(-by_fraction // multiple) * multiple
    return max(target, min(by_fraction if by_fraction <= target else rounded_up, (width - 1) // multiple * multiple))


def widest_before(width: int, multiple: int, max_event_fraction: float, initial: int) -> int:
    """Widest axis, a multiple or `initial`, that one event may bring down to `width`."""
    by_fraction = initial if max_event_fraction >= 1 else math.floor(width / (1 - max_event_fraction) + 1e-9)
    widest = max(by_fraction, (width // multiple + 1) * multiple)
    return initial if initial <= widest else max(width, widest // multiple * multiple)


class WidthSchedule:
    """The path of every axis: `due(step)` gives the axes that change after update `step`.

    Args:
        initial, target: widths before and after; axes absent from `target` stay.
        config: schedule, fractions, interval, multiples, largest event.
        steps: optimizer steps of the run.
    """

    def __init__(self, initial: Widths, target: Widths, config: PruningConfig, steps: int) -> None:
        self.initial, self.target = dict(initial), dict(target)
        self.table: dict[int, dict[str, int]] = {}
        self.end_step = 0
        if config.schedule == "none":
            return
        if config.schedule == "one_shot":
            self.table = {0: {axis: width for axis, width in target.items() if width < initial[axis]}}
            return
        start_step, self.end_step = round(config.start_fraction * steps), round(config.end_fraction * steps)
        at = event_steps(start_step, self.end_step, config.interval_steps)
        self.end_step = at[-1]
        for axis in target:
            self._add_axis(axis, at, start_step, config)

    def _add_axis(self, axis: str, at: list[int], start_step: int, config: PruningConfig) -> None:
        initial, target = self.initial[axis], self.target[axis]
        ratios = [keep_ratio(config.schedule, step, start_step, self.end_step, target / initial) for step in at]
        try:
            path = width_path(ratios, initial, target, multiple_of(axis, config), config.max_event_fraction)
        except ValueError:
            raise unreachable(axis, initial, target, len(at), config) from None
        previous = initial
        for step, width in zip(at, path, strict=True):
            if width < previous:
                self.table.setdefault(step, {})[axis] = width
            previous = width

    def due(self, step: int) -> Mapping[str, int]:
        """Axis -> new width for the axes that change after update `step`; empty nearly always."""
        return self.table.get(step, {})

    def reached(self, step: int) -> dict[str, int]:
        """Axis -> width after update `step`, for the axes that have changed by then."""
        events = (self.table[at] for at in sorted(self.table) if at <= step)
        return {axis: width for event in events for axis, width in event.items()}

    @property
    def num_events(self) -> int:
        return len(self.table)


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
    if axis.endswith(".ffn"):
        return config.ffn_multiple
    return 1 if axis.endswith(".heads") else config.head_dim_multiple
