"""Rates are chosen on the right half, and verdicts need enough seeds and distance."""

from __future__ import annotations

import math

import pytest
from study_fakes import FakePool, measured, study_options

from experiments.quality.arms import ARMS
from experiments.quality.comparison import OWN_SHAPE, Entry, run_seeds, try_rates
from experiments.quality.compute_map import Cell, compute_ratio, longer_steps
from experiments.quality.statistics import Mean, best_rate, extension, paired, spread, verdict


def test_the_rate_is_chosen_on_the_validation_half_and_every_grid_is_extended_once(tmp_path):

    # TEST would choose otherwise everywhere.
    losses = {
        "one_shot/half": {0.003: 4.3, 0.006: 4.1, 0.012: 4.2},
        "homodistil/half": {0.003: 4.3, 0.006: 4.2, 0.012: 4.1, 0.024: 4.0, 0.048: 3.0},
        "mlm_only/half": {0.0015: 4.5, 0.003: 4.0, 0.006: 4.1, 0.012: None},
    }

    def outcome(name: str, rate: float, seed: int):
        loss = losses[name][rate]
        return None if loss is None else measured(loss, 10 - loss)

    options = study_options(tmp_path, "main", "--no-tune", "--widths", "half", "--rates", "0.003", "0.006", "0.012")
    pool = FakePool(outcome, tmp_path)
    entries = [Entry(ARMS[name], "half") for name in ("one_shot", "homodistil", "mlm_only")]
    try_rates(pool, options, entries)
    assert [entry.rate for entry in entries] == [0.006, 0.024, 0.003]
    assert [entry.extended for entry in entries] == [[], [0.024], [0.0015]]  # not again to .048, which would be best
    assert {seed for _, _, _, seed in pool.asked} == {0}

    pool.asked.clear()
    run_seeds(pool, options, entries)
    assert [(name, rate) for _, name, rate, seed in pool.asked if seed == 2] == [
        ("one_shot/half", 0.006),
        ("homodistil/half", 0.024),
        ("mlm_only/half", 0.003),
    ]
    assert list(entries[0].runs) == [0, 1, 2]


def test_a_study_may_extend_a_grid_until_its_best_rate_is_inside(tmp_path):

    losses = {
        "one_shot/half": {0.003: 4.3, 0.006: 4.2, 0.012: 4.1, 0.024: 4.0, 0.048: 3.9, 0.096: 3.8},
        "homodistil/half": {0.003: 4.3, 0.006: 4.2, 0.012: 4.1, 0.024: 4.15},
        "mlm_only/half": {0.0015: 3.9, 0.003: 4.0, 0.006: 4.1, 0.012: 4.2, 0.00075: None},
    }
    options = study_options(tmp_path, "main", "--no-tune", "--widths", "half", "--rates", "0.003", "0.006", "0.012")
    entries = [Entry(ARMS[name], "half") for name in ("one_shot", "homodistil", "mlm_only")]

    def outcome(name: str, rate: float, seed: int):
        loss = losses[name][rate]
        return None if loss is None else measured(loss, 4.0)

    try_rates(FakePool(outcome, tmp_path), options, entries, extensions=2)
    # The first stops at the limit, the second inside its grid; a rate that failed ends the third's.
    assert [entry.extended for entry in entries] == [[0.024, 0.048], [0.024], [0.0015, 0.00075]]
    assert [entry.rate for entry in entries] == [0.048, 0.012, 0.0015]


def test_every_method_has_a_grid_around_its_own_rate_unless_one_is_given(tmp_path):

    def outcome(name: str, rate: float, seed: int):
        return measured(4 + abs(rate - 0.012), 4.0)

    def asked(arm: str, width: str, *arguments: str) -> list[float]:
        pool = FakePool(outcome, tmp_path)
        options = study_options(tmp_path, "main", "--no-tune", *arguments)
        try_rates(pool, options, [Entry(ARMS[arm], width)])
        return [rate for phase, _, rate, _ in pool.asked if phase == "learning rates"]

    assert ARMS["one_shot"].rate == 6e-3 and ARMS["tinybert"].rate == 1.2e-2
    assert asked("one_shot", "half") == [0.003, 0.006, 0.012]
    assert asked("one_shot", "quarter") == asked("tinybert", "half") == [0.006, 0.012, 0.024]
    assert asked("distilbert_layers", OWN_SHAPE) == [0.0015, 0.003, 0.006]
    for arm, width in (("one_shot", "half"), ("tinybert", "quarter")):
        assert asked(arm, width, "--rates", "0.01", "0.02", "0.04") == [0.01, 0.02, 0.04]


def test_a_method_whose_runs_all_failed_has_no_rate():

    assert best_rate({0.1: None, 0.2: math.nan}) is None
    assert extension({0.1: None, 0.2: None}) is None


def test_a_verdict_needs_more_than_two_deviations_of_the_difference():

    assert spread([4.0, 4.1, 4.2]) == pytest.approx((4.1, 0.1, 3))
    assert spread([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))  # n - 1
    # sqrt(.03^2 + .04^2) = .05, so .1 is exactly two of them.
    assert verdict(Mean(4.0, 0.03, 3), Mean(4.11, 0.04, 3), True) == pytest.approx((-0.11, 0.05, True))
    assert not verdict(Mean(4.0, 0.03, 3), Mean(4.09, 0.04, 3), True).is_better
    assert not verdict(Mean(4.0, 0.03, 3), Mean(4.11, 0.04, 3), False).is_better  # the other direction
    assert verdict(Mean(0.9, 0.01, 3), Mean(0.8, 0.01, 3), False).is_better
    assert not verdict(spread([4.0]), spread([9.0]), True).is_better  # one seed proves nothing
    assert paired([1.0, 2.0, 4.0], [0.5, 1.5, 3.5]) == pytest.approx((0.5, 0.0, 3))


def test_equal_compute_takes_the_dearer_measure_and_rounds_up():

    cell = Cell("half", 300)
    cell.gradual.runs = {0: measured(4, 4, cpu_s=12.0, flops=5.0), 1: measured(4, 4, cpu_s=14.0, flops=5.0)}
    cell.one_shot.runs = {0: measured(4, 4, cpu_s=10.0, flops=4.0)}
    assert compute_ratio(cell) == pytest.approx(1.3)  # 13 / 10 CPU seconds, FLOPs only 1.25
    assert longer_steps(300, 1.3) == 390
    assert longer_steps(300, 1.301) == 405  # steps of 15
    cell.one_shot.runs = {0: measured(4, 4, cpu_s=20.0, flops=8.0)}
    assert compute_ratio(cell) == 1.0
