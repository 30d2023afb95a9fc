"""Layers that leave a live engine: training goes on as a plain loop that takes them out by hand, for every wrapper.

What holds at each event (bitwise survivors under their new names, identity of objects, zero padding) is asserted inside
worker_trajectory.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_trajectory import IN_BF16, OFFLOAD, assert_close_to_its_control, assert_equals_reference, run_cases

SETTINGS = [
    {"stage": 2, "zero": {"round_robin_gradients": True, "overlap_comm": True}, "accumulation": 2},
    {"stage": 3, "accumulation": 2},
]
IN_FULL = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "zero": OFFLOAD | {"parameter_alignment": True}},
    {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
    {"stage": 3, "zero": OFFLOAD},
]
IN_BF16_IN_FULL = [{"stage": stage, "bf16": True} for stage in (0, 2, 3)]


def of_depth(settings: list[dict]) -> list[dict]:
    return [case | {"events": "depth"} for case in settings]


@pytest.fixture(scope="module")
def cases(server) -> list[dict]:
    hooked = IN_BF16 | {"bf16_settings": {"immediate_grad_update": True}}  # hooks that know numbers of parameters
    return run_cases(server, [*of_depth([*SETTINGS, hooked]), hooked | {"events": False}], 2)


@pytest.mark.parametrize("i", range(len(SETTINGS)), ids=map(json.dumps, SETTINGS))
def test_in_fp32_it_equals_plain_training(cases, i):
    assert_equals_reference(cases[i])


def test_in_bf16_it_is_as_close_as_without_events(cases):
    assert_close_to_its_control(*cases[-2:])


def test_what_cannot_leave_is_refused_before_anything_has_changed(server):
    worker = Path(__file__).with_name("worker_removal.py")
    assert "REFUSED" in server.run(worker, [], num_ranks=2, timeout_s=200)


@pytest.mark.full
def test_of_more_settings_it_equals_plain_training(server):
    for case in run_cases(server, of_depth(IN_FULL), 2):
        assert_equals_reference(case)


@pytest.mark.full
def test_of_more_settings_in_bf16_it_is_as_close_as_without_events(server):
    controls = [case | {"events": False} for case in IN_BF16_IN_FULL]
    cases = run_cases(server, of_depth(IN_BF16_IN_FULL) + controls, 2)
    for case, control in zip(cases[: len(controls)], cases[len(controls) :], strict=True):
        assert case["weight_mean"] <= control["weight_mean"] + 1e-5, (case, control)
