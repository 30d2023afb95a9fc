"""Training with resize events under real DeepSpeed equals a plain single-process loop that slices by hand.

What holds at each event (bitwise survivors, identity of objects, step counts, zero padding, equal plan hashes, every
live entry moving on the next step, a kept reference to the last loss) is asserted inside worker_trajectory.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("worker_trajectory.py")

FP32 = [
    {"stage": 0},
    {"stage": 0, "accumulation": 2},
    {"stage": 1},
    {"stage": 1, "accumulation": 2},
    {"stage": 2},
    {"stage": 2, "accumulation": 2},
    {"stage": 2, "zero": {"round_robin_gradients": True, "overlap_comm": True, "reduce_bucket_size": 5000}},
    {"stage": 2, "zero": {"parameter_alignment": True, "contiguous_gradients": False}},
]
BF16 = [
    {"stage": 2, "bf16": True},
    {"stage": 2, "bf16": True, "events": False},
    {"stage": 0, "bf16": True},
    {"stage": 1, "bf16": True, "zero": {"parameter_alignment": True}},
]


def run_cases(cases: list[dict], num_ranks: int, *flags: str) -> list[dict]:
    output = run_ranks(WORKER, [json.dumps(cases), *flags], num_ranks, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return run_cases(FP32 + BF16, 2, "--refusals")


def assert_equals_reference(case: dict) -> None:
    # fp32: the two sides sum gradients in another order. 1e-6 is 1/1000 of one step of the learning rate, and the
    # moments' tolerances are as small against their values (1e-3 and 1e-6): a row cut wrongly is off by far more.
    assert case["weight"] < 1e-6, case
    assert case["exp_avg"] < 1e-6, case
    assert case["exp_avg_sq"] < 1e-9, case
    assert case["loss"] < 5e-6, case  # ten fp32 roundings of a loss near 4.5


@pytest.mark.parametrize("i", range(len(FP32)), ids=[json.dumps(case) for case in FP32])
def test_fp32_equals_plain_training(two_ranks, i):
    case = two_ranks[i]
    assert case["wrapper"] == ("AdamW" if FP32[i]["stage"] == 0 else "DeepSpeedZeroOptimizer")
    assert_equals_reference(case)


def test_bf16_is_as_close_as_without_events(two_ranks):
    resized, control, unfused, _ = two_ranks[len(FP32) :]
    assert unfused["wrapper"] == "FP16_UnfusedOptimizer"
    # bf16 rounding can flip, and then paths drift apart; 1e-5 is 1/100 of one step of the learning rate.
    assert resized["weight_mean"] <= control["weight_mean"] + 1e-5, (resized, control)


def test_four_ranks_one_of_them_left_with_padding():
    (case,) = run_cases([{"stage": 2, "accumulation": 2}], 4)
    assert_equals_reference(case)
