"""In a step the host never waits for the device but where DeepSpeed makes it: real, not-logged steps of the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launch import run_ranks

WORKER = Path(__file__).with_name("worker_host_syncs.py")
OF_DEEPSPEED = {
    "mask_nan_or_inf_with_val_inplace": "makes a constant on the device, once a parameter group, for the norm",
    "is_invalid_grad_norm": "reads whether the norm is finite, once a parameter group, before it clips",
    "has_overflow": "fp16: reads whether any gradient has overflowed",
}
"""Function of DeepSpeed 0.19 -> what it waits for. ZeRO-2; homodistil leaves these alone."""

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found(device, tmp_path_factory) -> dict[str, list[dict]]:
    environment = {"DS_ACCELERATOR": device.type}
    output = run_ranks(WORKER, [str(tmp_path_factory.mktemp("work"))], 1, timeout_s=120, env=environment)
    line = next(line for line in output.splitlines() if line.startswith("SYNCS "))
    return json.loads(line.removeprefix("SYNCS "))


def test_a_wait_on_purpose_is_seen(gpu, found):
    assert len(found["on_purpose"]) == 1


def test_homodistil_never_waits(found):
    assert not [sync for sync in found["of_steps"] if sync["by"] != "deepspeed"]


def test_deepspeed_waits_where_it_is_known_to(found):
    print(json.dumps(found["of_steps"], indent=1))
    assert {sync["at"].split()[-1] for sync in found["of_steps"]} <= set(OF_DEEPSPEED)
