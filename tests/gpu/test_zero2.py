"""ZeRO-2 on one GPU, with resize events, equals a plain loop without DeepSpeed: tests/distributed's worker, one rank.

What holds at each event is asserted inside worker_trajectory.py. The plain loop runs on the CPU.
"""

from __future__ import annotations

import json

import pytest
from distributed.test_trajectory import WORKER
from support.launch import run_ranks

pytestmark = pytest.mark.gpu

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
FP32 = [
    {"stage": 2},
    {"stage": 2, "accumulation": 2, "zero": {"overlap_comm": True, "reduce_bucket_size": 5000}},
    {"stage": 2, "zero": OFFLOAD},
]
BF16 = [{"stage": 2, "bf16": True}, {"stage": 2, "bf16": True, "events": False}]


@pytest.fixture(scope="module")
def cases(device) -> list[dict]:
    environment = {"DS_ACCELERATOR": device.type}
    output = run_ranks(WORKER, [json.dumps(FP32 + BF16)], 1, timeout_s=200, env=environment)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


@pytest.mark.parametrize("i", range(len(FP32)), ids=[json.dumps(case) for case in FP32])
def test_fp32_equals_plain_training_on_the_cpu(cases, i):
    case = cases[i]
    assert case["wrapper"] == "DeepSpeedZeroOptimizer"
    # The two devices sum in another order, and Adam's first steps divide by tiny second moments: 2e-5 is 1/50 of one
    # step of the learning rate (1e-3). A row cut wrongly is off by hundreds of times as much.
    assert case["weight"] < 2e-5, case
    assert case["exp_avg"] < 1e-5 and case["exp_avg_sq"] < 1e-8, case
    assert case["loss"] < 5e-5, case


def test_bf16_is_as_close_as_without_events(cases):
    resized, control = cases[len(FP32) :]
    # The devices' bf16 products round differently, and then paths drift: 1e-4 is 1/10 of one step.
    assert resized["weight_mean"] <= control["weight_mean"] + 1e-4, (resized, control)
