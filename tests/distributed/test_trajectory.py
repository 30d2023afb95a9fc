"""Training with resize events under real DeepSpeed equals a plain single-process loop that slices by hand.

What holds at each event (bitwise survivors, identity of objects, step counts, zero padding, equal plan hashes, every
live entry moving on the next step, a kept reference to the last loss) is asserted inside worker_trajectory.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fork_server import ForkServer

WORKER = Path(__file__).with_name("worker_trajectory.py")

FP32 = [
    {"stage": 0, "accumulation": 2},
    {"stage": 1, "accumulation": 2},
    {"stage": 2, "accumulation": 2},
    {"stage": 2, "zero": {"round_robin_gradients": True, "overlap_comm": True, "reduce_bucket_size": 5000}},
    {"stage": 2, "zero": {"parameter_alignment": True, "contiguous_gradients": False}},
]
BF16 = [
    {"stage": 2, "bf16": True},
    {"stage": 2, "bf16": True, "events": False},
    {"stage": 0, "bf16": True},
]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOADED = [
    {"stage": 2, "zero": OFFLOAD},
    {"stage": 2, "zero": OFFLOAD, "accumulation": 2, "optimizer": "cpu_adam"},
]
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
IN_BF16 = {"stage": 1, "bf16": True, "config": FP32_SUMS, "reference": {"accumulate_fp32": True}, "accumulation": 2}
MORE_FP32 = [
    {"stage": 0},  # its steps are those of accumulation 2 with one micro-batch, as at stages 1 and 2
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "zero": {"reduce_scatter": False}},
    {"stage": 2, "zero": {"overlap_comm": True, "contiguous_gradients": False}},
    {"stage": 2, "zero": OFFLOAD | {"parameter_alignment": True, "round_robin_gradients": True}, "accumulation": 2},
    {"stage": 1, "zero": OFFLOAD},
    {"stage": 1, "zero": OFFLOAD, "optimizer": "cpu_adam"},
    {"stage": 0, "optimizer": "fused"},
]
MORE_BF16 = [
    {"stage": 1, "bf16": True, "zero": {"parameter_alignment": True}},
    {"stage": 1, "bf16": True, "config": FP32_SUMS, "reference": {"accumulate_fp32": True}},
    IN_BF16 | {"bf16_settings": {"immediate_grad_update": True}},
    {"stage": 2, "bf16": True, "config": FP32_SUMS, "reference": {"accumulate_fp32": True}},
    {"stage": 1, "bf16": True, "config": FP32_SUMS, "reference": {"accumulate_fp32": True}, "zero": OFFLOAD},
    {"stage": 2, "bf16": True, "zero": OFFLOAD},
    {"stage": 0, "bf16": True, "optimizer": "cpu_adam", "reference": {"warm_states": True}},
]
FUSED = {"stage": 0, "bf16": True, "optimizer": "fused", "reference": {"warm_states": True}}
"""An op that `make test` does not build."""


def run_cases(server: ForkServer, cases: list[dict], num_ranks: int, *flags: str) -> list[dict]:
    output = server.run(WORKER, [json.dumps(cases), *flags], num_ranks, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


@pytest.fixture(scope="module")
def two_ranks(server) -> list[dict]:
    return run_cases(server, FP32 + BF16, 2, "--refusals")


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
    resized, control, unfused = two_ranks[len(FP32) :]
    assert unfused["wrapper"] == "FP16_UnfusedOptimizer"
    # bf16 rounding can flip, and then paths drift apart; 1e-5 is 1/100 of one step of the learning rate.
    assert resized["weight_mean"] <= control["weight_mean"] + 1e-5, (resized, control)


def test_four_ranks_one_of_them_left_with_padding(server):
    (case,) = run_cases(server, [{"stage": 2, "accumulation": 2}], 4)
    assert_equals_reference(case)


# Where a sum of bf16 products is rounded depends on the CPU: below 2e-5 on one, 2.05e-5 on another. A step of Adam is
# about as large as the learning rate, 1e-3, and a wrong rule moves the weights by about as much.
_BF16_WEIGHT_MEAN = 5e-5


def assert_close_to_its_control(case: dict, control: dict) -> None:
    """bf16 rounding can flip, and then paths drift apart; 1e-5 is 1/100 of one step of the learning rate."""
    assert case["wrapper"] == control["wrapper"]
    assert case["weight_mean"] <= control["weight_mean"] + 1e-5, (case, control)
    assert control["weight_mean"] < _BF16_WEIGHT_MEAN, control  # or the reference is another computation


@pytest.fixture(scope="module")
def wrapped(server) -> list[dict]:
    return run_cases(server, [*OFFLOADED, IN_BF16, IN_BF16 | {"events": False}], 2)


def test_offload_equals_plain_training(wrapped):
    for case in wrapped[: len(OFFLOADED)]:
        assert_equals_reference(case)


def test_the_wrapper_of_bf16_is_as_close_as_without_events(wrapped):
    case, control = wrapped[len(OFFLOADED) :]
    assert case["wrapper"] == "BF16_Optimizer"
    assert_close_to_its_control(case, control)


def assert_settings_equal_plain_training(server: ForkServer, settings: list[dict]) -> None:
    for case in run_cases(server, settings, 2):
        assert_equals_reference(case)


def assert_settings_are_as_close_as_without_events(server: ForkServer, settings: list[dict]) -> set[str]:
    """The wrappers of DeepSpeed that they had."""
    cases = run_cases(server, settings + [case | {"events": False} for case in settings], 2)
    for case, control in zip(cases[: len(settings)], cases[len(settings) :], strict=True):
        assert_close_to_its_control(case, control)
    return {case["wrapper"] for case in cases}


@pytest.mark.full
def test_more_settings_equal_plain_training(server):
    assert_settings_equal_plain_training(server, MORE_FP32)


@pytest.mark.full
def test_more_bf16_settings_are_as_close_as_without_events(server):
    assert_settings_are_as_close_as_without_events(server, MORE_BF16)


@pytest.mark.full
def test_the_fused_wrapper_is_as_close_as_without_events(server):
    assert assert_settings_are_as_close_as_without_events(server, [FUSED]) == {"FP16_Optimizer"}


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_uneven_and_empty_partitions(server, num_ranks):
    cases = [{"stage": 2}, {"stage": 2, "accumulation": 2, "zero": OFFLOAD}, IN_BF16]
    *in_fp32, in_bf16 = run_cases(server, cases, num_ranks)
    for case in in_fp32:
        assert_equals_reference(case)
    assert in_bf16["weight_mean"] < _BF16_WEIGHT_MEAN, in_bf16
