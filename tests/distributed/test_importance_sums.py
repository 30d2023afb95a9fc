"""Importance sums read from partitioned gradients equal those of one process that sees the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_importance.py")


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = [{"stage": 0}, {"stage": 2}]
MORE_STAGES = [{"stage": 1}, {"stage": 2, "zero": OFFLOAD}]
BF16 = {"stage": 1, "bf16": True, "config": {"data_types": {"grad_accum_dtype": "fp32"}}}
FUSED = {"stage": 0, "bf16": True, "fused": True}


@pytest.mark.parametrize(
    ("num_ranks", "cases", "last_wrapper"),
    [
        (2, [*STAGES, BF16], "BF16_Optimizer"),
        pytest.param(2, MORE_STAGES, "DeepSpeedZeroOptimizer", marks=pytest.mark.full),  # the adapter of stage 2
        (4, [{"stage": 2}], "DeepSpeedZeroOptimizer"),
        pytest.param(2, [FUSED], "FP16_Optimizer", marks=pytest.mark.full),  # an op that `make test` does not build
    ],
)
def test_sums_equal_one_process(server, num_ranks, cases, last_wrapper):
    output = server.run(WORKER, [json.dumps(cases)], num_ranks, timeout_s=400)
    results = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        assert result["smallest_gradient_norm"] > result["clip"], "clipping has to act, or nothing is shown about it"
        # fp32: sums in another order. bf16: gradients of 8 bits, added up; a row taken for another is off by far more.
        for relative in (result["relative"], result["relative_normalised"]):
            assert relative < (0.1 if case.get("bf16") else 1e-5), (case, result)
    assert results[-1]["wrapper"] == last_wrapper
