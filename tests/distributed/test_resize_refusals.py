"""Engines that resizing does not know are refused at start, in one line that names what was found and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_refusals.py")

EXPECTED = {
    "bf16 accumulation": ["data_types.grad_accum_dtype", "found 'bf16'", "allows 'fp32'; remove it"],
    "autocast": ["torch_autocast.enabled", "set bf16.enabled"],
    "unmanaged": ["managed_gradient_accumulation", "found false"],
    "class": ["OtherBooks", "DeepSpeedZeroOptimizer", "torch_fused"],
    "field": ["round_robin_bit16_offsets: found nothing", "install deepspeed==0.19.8"],
    "type": ["partition_size: found a tuple, not a list", "install deepspeed==0.19.8"],
    "layout": ["round_robin_bit16_offsets[0]: found 3493 at 1, expected 3492", "install deepspeed==0.19.8"],
    "view": ["not a view", "install deepspeed==0.19.8"],
    "values": ["single_partition_of_fp32_groups[0]", "not these, rounded"],
    "alignment": ["bit16_groups_flat[0]: found", "install deepspeed==0.19.8"],
    "method": ["_create_param_mapping", "install deepspeed==0.19.8"],
    "meaning": ["bit16_groups_flat[0]: a parameter is not a view", "install deepspeed==0.19.8"],
    "warning of the untested version": ["0.20.1", "tested with (0.19.8)", "passed the self-check"],
}


@pytest.fixture(scope="module")
def messages(server) -> dict[str, str | None]:
    output = server.run(WORKER, [], num_ranks=1, timeout_s=300)
    cases = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    return {case["name"]: case["message"] for case in cases}


def test_a_known_engine_is_accepted(messages):
    assert messages["supported"] is None
    assert messages["untested version"] is None


@pytest.mark.parametrize("name", EXPECTED)
def test_refused(messages, name):
    message = messages[name]
    assert message is not None, "accepted"
    assert "\n" not in message
    for part in EXPECTED[name]:
        assert part in message, message
