"""The closed loop on made-up gap curves: target in time, bound kept or marked where it was not, pauses, resume."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homodistil.config.schema import PruningConfig
from homodistil.errors import UserError
from homodistil.pruning.gap_schedule import NUM_TRIALS, GapSchedule, width_stops

INITIAL = {"hidden": 128, "layer.0.ffn": 500, "layer.0.heads": 4, "layer.0.qk_dim": 32, "layer.0.vo_dim": 32}
TARGET = {"hidden": 60, "layer.0.ffn": 240, "layer.0.heads": 3, "layer.0.qk_dim": 20, "layer.0.vo_dim": 20}
STEPS = 200


def _schedule(**changes) -> GapSchedule:
    values = {"schedule": "gap", "end_fraction": 0.5, "width_multiple": 4, "interval_steps": 10}
    config = PruningConfig(**(values | {"max_event_fraction": 0.25} | changes))
    return GapSchedule(INITIAL, TARGET, config, STEPS)


class World:
    """A student whose gap is made up: a cut adds `cost(widths before, widths after)`, training takes a share away."""

    def __init__(self, schedule: GapSchedule, cost, recovery: float = 0.3) -> None:
        self.schedule, self.cost, self.recovery = schedule, cost, recovery
        self.widths, self.kl, self.events = dict(INITIAL), 0.0, []

    def step(self, step: int, skipped: bool = False) -> None:
        self.kl *= 1 - self.recovery
        if skipped or not self.schedule.is_due(step, self.widths):
            return
        before, tried = self.kl, []

        def trial(due: dict[str, int]) -> float:
            tried.append(due)
            return before + self.cost(self.widths, self.widths | due)

        decision = self.schedule.decide(step, self.widths, before, trial)
        assert len(tried) <= NUM_TRIALS + 1
        if decision is None:
            return
        old, self.widths = self.widths, self.widths | decision.widths
        assert decision.num_trials == len(tried)
        assert decision.forced or decision.widths in tried, "an event that was never tried"
        self.kl = before + self.cost(old, self.widths)
        told = self.schedule.after_event(step, before, self.kl, decision.forced)
        self.events.append(told | {"step": step, "old": old, "new": dict(self.widths)})

    def run(self, skipped=frozenset()) -> list[dict]:
        for step in range(1, STEPS + 1):
            self.step(step, step in skipped)
        return self.events


def _distance(old, new) -> float:
    """Sum over axes of the share that goes."""
    return sum((old[axis] - new[axis]) / INITIAL[axis] for axis in old)


def _is_multiple(axis: str, width: int) -> bool:
    multiple = 4 if axis == "hidden" else 8 if axis == "layer.0.ffn" else 1
    return width % multiple == 0 or width in (INITIAL[axis], TARGET[axis])


@settings(max_examples=60)
@given(
    scale=st.floats(0.0, 20.0),
    power=st.sampled_from([0.5, 1.0, 2.0]),
    bound=st.floats(0.01, 2.0),
    recovery=st.floats(0.0, 0.5),
    share=st.floats(0.0, 1.0),
    interval=st.sampled_from([1, 3, 10]),
    start=st.sampled_from([0.0, 0.1]),
    fraction=st.sampled_from([0.3, 1.0]),
    ragged=st.booleans(),
    skipped=st.sets(st.integers(1, STEPS - 60), max_size=40),
)
def test_target_in_time_and_bound_kept_or_marked(
    scale, power, bound, recovery, share, interval, start, fraction, ragged, skipped
):
    changes = {"gap_bound": bound, "gap_recovery": share, "interval_steps": interval, "start_fraction": start}
    schedule = _schedule(max_event_fraction=fraction, **changes)

    def cost(old, new) -> float:
        uneven = (hash(tuple(new.values())) % 7) / 3 if ragged else 1.0  # a further cut may cost less
        return scale * _distance(old, new) ** power * uneven

    world = World(schedule, cost, recovery)
    events = world.run(skipped)
    assert world.widths == TARGET
    if not skipped:
        assert events[-1]["step"] <= schedule.end_step == 100
    for event in events:
        step, old, new = event["step"], event["old"], event["new"]
        assert step > start * STEPS and (skipped or step % interval == 0 or step == schedule.end_step)
        assert event["gap_bound_kept"] == (event["gap_rise"] <= bound) and (
            event["gap_bound_kept"] or event["gap_forced"]
        )
        assert all(_is_multiple(axis, width) for axis, width in new.items())
        assert new["layer.0.qk_dim"] == new["layer.0.vo_dim"]  # stock attention needs them equal at all times
        for axis, width in new.items():
            multiple = {"hidden": 4, "layer.0.ffn": 8}.get(axis, 1)
            assert TARGET[axis] <= width <= old[axis]
            assert old[axis] - width <= max(fraction * old[axis] + 1e-6, multiple)
    above = [event["step"] for event in events if not event["gap_bound_kept"]]
    assert schedule.summary() == {"gap_events": len(events), "gap_events_above_bound": above}


def test_cuts_are_as_large_as_the_bound_allows():
    schedule = _schedule(gap_bound=0.5, gap_recovery=0.0, interval_steps=5)
    events = World(schedule, lambda old, new: _distance(old, new), recovery=0.5).run()
    assert all(event["gap_bound_kept"] and not event["gap_forced"] for event in events)
    # All of it costs 2.1: five events of at most .5, the last of what is left. Bisection comes near the bound.
    assert 5 <= len(events) <= 6 and all(event["gap_rise"] > 0.4 for event in events[:4])


def test_without_any_cost_one_event_does_it_all_in_the_end_allowed():
    events = World(_schedule(gap_bound=0.1, max_event_fraction=1.0, interval_steps=5), lambda *_: 0.0).run()
    assert len(events) == 1 and events[0]["step"] == 5 and events[0]["new"] == TARGET


def test_it_waits_ahead_of_the_line_until_its_share_is_won_back():
    schedule = _schedule(gap_bound=1.0, gap_recovery=0.5, interval_steps=5)
    tried = []

    def look(step: int, kl: float):
        return schedule.decide(step, INITIAL | now, kl, lambda due: tried.append(due) or kl + 0.1)

    now: dict[str, int] = {}
    now |= look(5, 0.0).widths  # the largest cut allowed: far ahead of the line
    schedule.after_event(5, 0.0, 0.4, False)
    tried.clear()
    assert look(10, 0.21) is None and not tried  # of a rise of .4, less than half is won back
    assert look(15, 0.2) is not None


def test_behind_the_line_it_does_not_wait_but_keeps_the_bound():
    schedule = _schedule(gap_bound=0.1, gap_recovery=1.0, interval_steps=5)
    world = World(schedule, lambda old, new: 1.5 * _distance(old, new), recovery=0.0)  # never wins anything back
    events = world.run()
    first_half = [event for event in events if event["step"] <= 50]
    assert len(first_half) == 10 and all(event["gap_bound_kept"] for event in first_half)
    assert world.widths == TARGET


def test_a_gap_that_is_not_a_number_is_never_within_the_bound():
    schedule = _schedule(gap_bound=0.1, interval_steps=5)
    assert schedule.decide(5, INITIAL, 0.0, lambda _due: math.nan) is None


def test_a_hopeless_bound_is_broken_in_even_cuts_of_the_second_half_only():
    schedule = _schedule(gap_bound=1e-9, interval_steps=5)
    events = World(schedule, _distance).run()
    assert all(event["gap_forced"] and not event["gap_bound_kept"] for event in events)
    # Ten cuts of 2.1 together; one takes a whole head, which is .25 alone.
    assert len(events) == 10 and events[0]["step"] == 55 and max(event["gap_rise"] for event in events) < 0.45
    assert "all but 10, after updates 55, 60" in schedule.report()


def test_few_events_are_forced_in_time_for_the_largest_cut_allowed():
    """128, 104, 84, 68, 60: four of the five events at least, so the first forced one is the second."""
    events = World(_schedule(gap_bound=1e-9, interval_steps=20, max_event_fraction=0.2), _distance).run()
    assert events[-1]["new"] == TARGET and events[0]["step"] == 40
    assert all(event["gap_forced"] for event in events)


def test_events_that_fell_on_skipped_updates_at_the_end_are_made_up():
    schedule = _schedule(gap_bound=1e-9, interval_steps=5)
    world = World(schedule, _distance)
    events = world.run(skipped=range(55, 105))
    # 128, 96, 72, 60: each of them the largest cut allowed.
    assert world.widths == TARGET and [event["step"] for event in events] == [105, 106, 107]


def test_stops_are_the_nearest_multiples_to_a_straight_line():
    stops = width_stops(INITIAL, TARGET, PruningConfig(width_multiple=4))
    assert stops[0] == INITIAL and stops[-1] == TARGET
    hidden = sorted({stop["hidden"] for stop in stops})
    assert hidden == list(range(60, 129, 4))
    # Half the way: 94 hidden (92 or 96), 370 ffn, 26 dims of a head.
    middle = [stop for stop in stops if stop["layer.0.qk_dim"] == 26]
    assert all(stop["hidden"] in (92, 96) and abs(stop["layer.0.ffn"] - 370) <= 16 for stop in middle)


def test_a_target_out_of_reach_is_refused_before_training():
    with pytest.raises(UserError, match="pruning.max_event_fraction: hidden cannot go from 128 to 60 in 2 events"):
        _schedule(interval_steps=50, max_event_fraction=0.1)


@pytest.mark.parametrize("stop_at", [1, 5, 37, 60, 99])
def test_a_resumed_controller_decides_alike(stop_at):
    def world() -> World:
        return World(_schedule(gap_bound=0.15, interval_steps=3), lambda old, new: 1.3 * _distance(old, new))

    whole, first, second = world(), world(), world()
    whole.run()
    for step in range(1, stop_at + 1):
        first.step(step)
    second.schedule.load_state_dict(json.loads(json.dumps(first.schedule.state_dict())))
    second.widths, second.kl = first.widths, first.kl
    for step in range(stop_at + 1, STEPS + 1):
        second.step(step)
    assert first.events + second.events == whole.events and len(whole.events) > 5
    assert second.schedule.summary() == whole.schedule.summary()
