"""Importance sums read from partitioned gradients equal those of one process that sees the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_ranks

WORKER = Path(__file__).with_name("worker_importance.py")


@pytest.mark.parametrize(("num_ranks", "stages"), [(2, [0, 1, 2]), (4, [2])])
def test_sums_equal_one_process(num_ranks, stages):
    output = run_ranks(WORKER, [json.dumps(stages)], num_ranks, timeout_s=400)
    cases = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    assert [case["stage"] for case in cases] == stages
    for case in cases:
        assert case["smallest_gradient_norm"] > case["clip"], "clipping has to act, or the test shows nothing about it"
        assert case["relative"] < 1e-5, case  # fp32 sums in another order
