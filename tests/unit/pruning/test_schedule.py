"""Schedule properties: starts full, never rises, ends exactly on target, multiples and event sizes respected."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homodistil.config.schema import PruningConfig
from homodistil.errors import UserError
from homodistil.pruning.schedule import WidthSchedule, event_steps, keep_ratio, width_path


@given(
    kind=st.sampled_from(["cubic", "linear"]),
    start=st.integers(0, 500),
    length=st.integers(1, 1000),
    final=st.floats(0.01, 1.0),
)
def test_keep_ratio_falls_from_one_to_final(kind, start, length, final):
    ratios = [keep_ratio(kind, t, start, start + length, final) for t in range(0, start + length + 20)]
    assert ratios[0] == 1.0 or start == 0 and ratios[0] == 1.0
    assert all(a >= b - 1e-12 for a, b in zip(ratios, ratios[1:], strict=False))
    assert ratios[start + length :] == [final] * 20
    assert all(final - 1e-12 <= r <= 1.0 for r in ratios)


def test_cubic_matches_the_formula_by_hand():
    # r_f + (1 - r_f) (1 - 1/4)^3 with r_f = 1/2: 1/2 + 27/128
    assert keep_ratio("cubic", 25, 0, 100, 0.5) == pytest.approx(0.5 + 27 / 128)
    assert keep_ratio("linear", 25, 0, 100, 0.5) == pytest.approx(0.875)


def _reachable(initial, target, multiple, fraction, events):
    """Every width that some sequence of allowed cuts leads to, by trying them all."""
    allowed = {initial, target, *range(multiple, initial, multiple)}
    reached = {initial}
    for _ in range(events):
        cuts = {(w, v) for w in reached for v in allowed if target <= v <= w}
        reached = {v for w, v in cuts if w - v <= fraction * w + 1e-6 or w <= (v // multiple + 1) * multiple}
    return reached


@settings(max_examples=200, deadline=None)
@given(
    initial=st.integers(2, 300),
    share=st.floats(0.05, 1.0),
    multiple=st.sampled_from([1, 2, 8, 64]),
    fraction=st.floats(0.2, 1.0),
    events=st.integers(1, 60),
)
def test_width_path_properties(initial, share, multiple, fraction, events):
    target = max(1, round(initial * share))
    ratios = [keep_ratio("cubic", k + 1, 0, events, target / initial) for k in range(events)]
    try:
        path = width_path(ratios, initial, target, multiple, fraction)
    except ValueError:
        assert target not in _reachable(initial, target, multiple, fraction, events)
        return
    assert path[-1] == target
    previous = initial
    for width in path:
        assert target <= width <= previous
        assert width in (initial, target) or width % multiple == 0
        assert previous - width <= max(fraction * previous + 1e-6, multiple)
        previous = width


def test_event_steps_end_exactly_on_the_last_step():
    assert event_steps(0, 25, 10) == [10, 20, 25]
    assert event_steps(5, 30, 10) == [10, 20, 30]
    assert event_steps(0, 0, 10) == [1]


def _schedule(**changes):
    values = {"end_fraction": 0.5, "interval_steps": 10, "width_multiple": 8, "max_event_fraction": 0.25}
    config = PruningConfig(**({"schedule": "cubic"} | values | changes))
    initial = {"hidden": 128, "layer.0.ffn": 512, "layer.0.heads": 4, "layer.0.qk_dim": 32, "layer.0.vo_dim": 32}
    target = {"hidden": 60, "layer.0.ffn": 240, "layer.0.heads": 3, "layer.0.qk_dim": 20, "layer.0.vo_dim": 20}
    return WidthSchedule(initial, target, config, steps=400), initial, target


@pytest.mark.parametrize("kind", ["cubic", "linear"])
def test_schedule_walks_every_axis_to_its_own_target(kind):
    schedule, widths, target = _schedule(schedule=kind)
    for step in range(401):
        due = schedule.table.get(step, {})
        assert not due or step % 10 == 0
        assert due.get("layer.0.qk_dim") == due.get("layer.0.vo_dim")  # stock attention needs them equal at all times
        widths = widths | due
        if step >= 200:
            assert widths == target


def test_one_shot_cuts_everything_at_step_0_and_none_nothing():
    schedule, _, target = _schedule(schedule="one_shot")
    assert schedule.table.get(0, {}) == target and not any(schedule.table.get(step, {}) for step in range(1, 401))
    schedule, _, _ = _schedule(schedule="none")
    assert not any(schedule.table.get(step, {}) for step in range(401))


@pytest.mark.parametrize("kind", ["cubic", "linear"])
@pytest.mark.parametrize("end_fraction", [0.05, 0.1])
def test_front_loaded_schedules_cut_after_every_step_and_end_in_time(kind, end_fraction):
    schedule, _, target = _schedule(schedule=kind, end_fraction=end_fraction, interval_steps=1)
    last = round(400 * end_fraction)
    assert schedule.end_step == last and max(schedule.table) <= last and schedule.reached(last) == target
    assert len(schedule.table) >= last // 2
    first = min(schedule.table)
    assert first <= 2 and schedule.reached(last // 2)["layer.0.ffn"] < 512


def test_a_path_that_cannot_be_walked_is_refused_before_training():
    with pytest.raises(UserError, match="pruning.max_event_fraction.*interval_steps"):
        _schedule(interval_steps=100, max_event_fraction=0.1)


def test_reached_is_the_sum_of_all_events_so_far():
    config = PruningConfig(
        schedule="cubic", interval_steps=3, end_fraction=0.8, width_multiple=4, max_event_fraction=0.25
    )
    schedule = WidthSchedule({"hidden": 64, "layer.0.ffn": 96}, {"hidden": 32, "layer.0.ffn": 40}, config, steps=30)
    widths: dict[str, int] = {}
    for step in range(31):
        widths |= schedule.table.get(step, {})
        assert schedule.reached(step) == widths
    assert widths == {"hidden": 32, "layer.0.ffn": 40}
