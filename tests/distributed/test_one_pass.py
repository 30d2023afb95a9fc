"""Importance counted while AdamW updates: the sums of the pass before the step, and AdamW's own weights and states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_ranks

WORKER = Path(__file__).with_name("worker_one_pass.py")

STAGES = [{"stage": 0}, {"stage": 2, "zero": {"round_robin_gradients": True}}]
OTHERS = [
    {"stage": 1, "bf16": True},
    {"stage": 1},
    {"stage": 1, "clip": 1e3},  # nothing is clipped
    {"stage": 0, "bf16": True},
    {"stage": 1, "bf16": True, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    {"stage": 3},
    {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}},
    {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [(2, STAGES), pytest.param(2, OTHERS, marks=pytest.mark.full), pytest.param(3, STAGES, marks=pytest.mark.full)],
)
def test_one_pass_equals_two(num_ranks, cases):
    output = run_ranks(WORKER, [json.dumps(cases)], num_ranks, timeout_s=400)
    results = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        clips = result["smallest_norm"] > 2 * case.get("clip", 0.05)
        assert clips == ("clip" not in case), "the factor of clipping is what is shown"
        # fp32 sums in another order, and of gradients that were multiplied and divided.
        assert result["two_pass"] < 1e-6 and result["naive"] < 1e-6, (case, result)
        # The same formula, block by block: roundings of 20 updates.
        assert result["weight"] < 1e-6 and result["exp_avg"] < 1e-7 and result["exp_avg_sq"] < 1e-9, (case, result)
