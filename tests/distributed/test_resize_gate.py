"""A resize event that leaves anything wrong on one rank stops all ranks, with a line that names rank and check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_gate.py")

EXPECTED = {
    "spoil_moment": "exp_avg_sq of bert",
    "spoil_weight": "single_partition_of_fp32_groups[0]",  # a NaN is not equal to itself, rounded
    "spoil_padding": "padding of a flat buffer is not zero",
    "spoil_shape": "has shape (28,), the plan says (29,)",
    "spoil_cast": "single_partition_of_fp32_groups[0]: the model's weights are not these, rounded",
}


@pytest.fixture(scope="module")
def messages(server) -> dict[str, list[str | None]]:
    output = server.run(WORKER, [], num_ranks=2, timeout_s=200)
    cases = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    return {case["name"]: case["messages"] for case in cases}


def test_a_right_event_passes(messages):
    assert messages["spoil_nothing"] == [None, None]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_rank_stops_with_the_same_line(messages, name):
    message, other = messages[name]
    assert message is not None and message == other
    assert "rank 1: " in message and "rank 0: " not in message and "\n" not in message
    assert EXPECTED[name] in message and "last checkpoint is intact" in message
