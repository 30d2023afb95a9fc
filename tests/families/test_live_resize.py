"""Live events and bitwise resume of every family on two ranks, under ZeRO-2 and ZeRO-3: see worker_live.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families.cases import make_model

from homodistil.models import FAMILIES, family_of

WORKER = Path(__file__).with_name("worker_live.py")
STAGES = (2, 3)


@pytest.fixture(scope="module")
def passed(server, request) -> dict[tuple[str, int], dict]:
    """(model type, ZeRO stage) -> what one job says of all that are selected."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = [(each["model_type"], each["stage"]) for each in selected]
    output = server.run(WORKER, [json.dumps(cases)], num_ranks=2, timeout_s=400)
    lines = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("CASE ")]
    return {(case["model_type"], case["stage"]): case for case in lines}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_live_events_and_resume_are_bitwise(passed, model_type, stage):
    case, widths = passed[model_type, stage], family_of(model_type).axis_table(make_model(model_type)).widths
    assert case["events"] == 2
    assert all(case["widths"][axis] < widths[axis] // 2 for axis in ("hidden", "layer.1.ffn"))
