"""When layers leave, and which may."""

from __future__ import annotations

import pytest

from homodistil.config.schema import PruningConfig
from homodistil.pruning.depth_schedule import DepthSchedule, depth_schedule


def linear(num_layers: int, count: int, steps: int = 100, start: float = 0.0, end: float = 0.5) -> DepthSchedule:
    pruning = PruningConfig(depth_schedule="linear", start_fraction=start, end_fraction=end)
    return depth_schedule(pruning, steps, num_layers, range(count), chosen=True)


def test_layers_leave_one_at_a_time_and_the_last_where_pruning_ends():
    assert linear(12, 7).table == {10: 11, 20: 10, 30: 9, 40: 8, 50: 7}
    assert linear(12, 7, start=0.2).table == {26: 11, 32: 10, 38: 9, 44: 8, 50: 7}
    assert linear(3, 2).table == {50: 2}


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_with_few_steps_several_leave_at_once_and_none_is_forgotten(steps, end):
    table = linear(24, 9, steps, end=end).table
    assert min(table) >= 1 and max(table) == max(1, round(end * steps)) and table[max(table)] == 9
    counts = [table[step] for step in sorted(table)]
    assert counts == sorted(counts, reverse=True)


def test_all_at_once_before_the_first_step_by_default():
    schedule = depth_schedule(PruningConfig(), 100, 12, (0, 2, 4), chosen=False)
    assert schedule.table == {0: 3} and schedule.due(0, 12) == 3 and schedule.due(0, 3) is None


def test_an_event_on_a_skipped_update_is_still_due():
    schedule = linear(12, 7)
    assert schedule.due(9, 12) is None and schedule.due(10, 12) == 11
    assert schedule.due(13, 12) == 11 and schedule.due(13, 11) is None
    assert schedule.due(31, 12) == 9


def test_the_first_layer_stays_and_those_that_are_to_stay():
    chosen, known = linear(6, 3), DepthSchedule({9: 3}, frozenset({0, 2, 4}))
    assert chosen.candidates((0, 1, 3, 5)) == [1, 2, 3]
    assert known.candidates((0, 1, 2, 4, 5)) == [1, 4]
