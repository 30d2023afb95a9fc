"""fp16 with dynamic loss scaling under real DeepSpeed on the CPU: overflows, importance and resize events together.

What holds at each step (a skipped one changes neither scores nor weights nor moments, the loss scale and its counts
survive an event, survivors are bitwise the same) is asserted inside worker_fp16.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.fork_server import ForkServer

WORKER = Path(__file__).with_name("worker_fp16.py")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
MORE_CASES = [
    {"stage": 0, "optimizer": "fused"},  # an op that `make test` does not build
    {"stage": 0},
    {"stage": 1},
    {"stage": 2, "zero": OFFLOAD},
    {"stage": 2, "zero": OFFLOAD, "optimizer": "cpu_adam"},
]
INJECTED_STEPS = {6, 9}


def run_cases(server: ForkServer, cases: list[dict], num_ranks: int) -> list[dict]:
    output = server.run(WORKER, [json.dumps(cases)], num_ranks, timeout_s=400)
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


def assert_overflows_are_survived(case: dict) -> None:
    skipped, scales = set(case["skipped"]), case["scales"]
    # Events fall on 3, 6, 9 and 11.
    assert INJECTED_STEPS < skipped and 3 in skipped, "the initial scale was to overflow as well"
    assert case["skipped_steps"] == len(skipped)
    # Each waited for the next update that was applied, but the last.
    assert case["resized_at"] == [4, 7, 10, 11] and not skipped & set(case["resized_at"])
    assert scales[9] == scales[7] / 2, "an overflow halves the scale"
    # A path of its own that the same fp16 arithmetic takes; rounding can flip, and 1e-5 is 1/100 of one step of the
    # learning rate. Dividing by a wrong loss scale, or taking a skipped step, would be off by whole steps.
    assert math.isfinite(case["weight_mean"]) and case["weight_mean"] < 1e-5, case
    assert case["loss"] < 0.02, case  # two fp16 roundings of a loss near 4.5


def test_skipped_steps_leave_scores_and_widths_alone(server):
    (case,) = run_cases(server, [{"stage": 2}], 2)
    assert case["wrapper"] == "DeepSpeedZeroOptimizer"
    assert_overflows_are_survived(case)


@pytest.mark.full
def test_every_other_wrapper(server):
    cases = run_cases(server, MORE_CASES, 2)
    assert len(cases) == len(MORE_CASES) and cases[0]["wrapper"] == "FP16_Optimizer"
    for case in cases:
        assert_overflows_are_survived(case)
