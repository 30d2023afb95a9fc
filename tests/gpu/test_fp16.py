"""fp16 with dynamic loss scaling on a GPU: the worker of tests/distributed/test_loss_scaling.py, on one rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
CASES = [
    {"stage": 2},
    {"stage": 2, "events": False},
    {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    from support.launch import run_ranks

    worker = DISTRIBUTED / "worker_fp16.py"
    output = run_ranks(worker, [json.dumps(CASES)], num_ranks=1, timeout_s=500, env={"DS_ACCELERATOR": "cuda"})
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]


@pytest.mark.parametrize("i", [0, 2], ids=["on the GPU", "offloaded"])
def test_an_overflow_skips_importance_and_resize(runs, i):
    # That a skipped step changes no score, and an event neither the loss scale nor its counts, is asserted inside.
    skipped, resized_at = set(runs[i]["skipped"]), set(runs[i]["resized_at"])
    assert {6, 9} <= skipped
    assert not skipped & resized_at
    assert resized_at - {3, 6, 9, 11}, "no event had to wait for a step that was applied"


def test_events_stay_as_close_to_plain_training_as_the_control(runs):
    resized, control, offloaded = runs
    # The reference runs on the CPU, so both drift from it by the GPU's roundings; 1e-4 is 1/10 of one step.
    for run in (resized, offloaded):
        assert math.isfinite(run["weight_mean"])
        assert run["weight_mean"] <= control["weight_mean"] + 1e-4, (run, control)
