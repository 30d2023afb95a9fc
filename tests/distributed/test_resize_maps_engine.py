"""Events that contract, cut, refit and reset under real DeepSpeed equal a single process in float64.

Values of every event (weights, masters, moments against float64; padding; identity of objects) are asserted inside
worker_maps.py, also in bf16, where paths drift apart afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fork_server import ForkServer

WORKER = Path(__file__).with_name("worker_maps.py")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
MORE = [
    {"stage": 0},
    {"stage": 1, "accumulation": 1, "zero": {"parameter_alignment": True}},
    {"stage": 2, "zero": OFFLOAD, "optimizer": "cpu_adam"},
    {"stage": 2, "zero": {"round_robin_gradients": True}},
    {"stage": 3, "zero": OFFLOAD},
    {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
]
BF16 = [
    {"stage": 0, "bf16": True},
    {"stage": 0, "bf16": True, "optimizer": "fused"},
    {"stage": 1, "bf16": True, "config": FP32_SUMS},
    {"stage": 2, "bf16": True},
    {"stage": 2, "bf16": True, "zero": OFFLOAD},
    {"stage": 3, "bf16": True},
]


def run_cases(server: ForkServer, cases: list[dict], num_ranks: int) -> list[dict]:
    output = server.run(WORKER, [json.dumps(cases)], num_ranks, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


def assert_equals_float64(case: dict) -> None:
    # Found: 2e-6, 6e-8, 4e-11 and 7e-7. The bounds leave room for another order of summation; 1e-4 is what is promised,
    # and a moment that does not follow its maps is off by more than 1e-4.
    assert case["weight"] < 2e-5, case
    assert case["exp_avg"] < 1e-6, case
    assert case["exp_avg_sq"] < 1e-9, case
    assert case["loss"] < 5e-6, case


def test_zero2_and_zero3_equal_a_single_process_in_float64(server):
    cases = run_cases(server, [{"stage": 2}, {"stage": 3}], 2)
    assert [case["wrapper"] for case in cases] == ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"]
    for case in cases:
        assert_equals_float64(case)


@pytest.mark.full
def test_more_settings(server):
    for case in run_cases(server, MORE, 2):
        assert_equals_float64(case)


@pytest.mark.full
def test_bf16_keeps_fp32_masters_exact(server):
    assert len(run_cases(server, BF16, 2)) == len(BF16)


@pytest.mark.full
def test_three_ranks_with_uneven_shares(server):
    for case in run_cases(server, [{"stage": 2}, {"stage": 3}], 3):
        assert_equals_float64(case)
