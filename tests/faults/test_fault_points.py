"""HOMODISTIL_FAULT is understood or refused; gradients that are not finite; what clocks the product reads."""

import ast

import pytest
from support.fork_server import ROOT
from support.small_job import TRAIN, arguments, differences, result

from homodistil.distributed import fault_injection
from homodistil.distributed.exit_codes import CHECK_FAILED, USER_ERROR
from homodistil.errors import UserError


def test_several_faults_with_all_their_parts():
    found = fault_injection.parse("train.step:rank=1:hit=20:action=hang, resize.moved")
    assert [(f.point, f.rank, f.hit, f.action) for f in found] == [
        ("train.step", 1, 20, "hang"),
        ("resize.moved", None, 1, "kill"),
    ]
    assert fault_injection.parse("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.stop", "unknown point 'train.stop'; allowed: train.step,"),
        ("train.step:rank=x", "found 'rank=x'; allowed: rank=R, hit=N, action=kill"),
        ("train.step:action=burn", "found 'action=burn'; allowed: "),
        ("train.step:often", "found 'often'; allowed: "),
    ],
)
def test_what_is_not_understood_is_refused(text, message):
    with pytest.raises(UserError, match=f"^HOMODISTIL_FAULT: {message}"):
        fault_injection.parse(text)


def test_a_misspelt_fault_ends_the_job_with_one_line(server, run_inputs, tmp_path):
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run"), env={"HOMODISTIL_FAULT": "train.stop"})
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2
    assert [line[:50] for line in job.output().splitlines() if line.startswith(("error", "Trace"))] == [
        "error: HOMODISTIL_FAULT: unknown point 'train.stop"
    ]


def test_every_point_is_in_the_code_and_no_other():
    used = set()
    for path in (ROOT / "homodistil").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault_point":
                used.add(node.args[0].value)
    assert used == set(fault_injection.POINTS)


def test_gradients_that_are_not_finite_stop_the_job_with_its_last_checkpoint(server, run_inputs, tmp_path):
    """DeepSpeed leaves such a step out without a word (fp32, ZeRO-2). One rank's micro-batch is enough."""
    folder = tmp_path / "run"
    fault = {"HOMODISTIL_FAULT": "train.backward:rank=1:hit=10:action=nan"}  # two micro-batches a step: step 5
    job = server.start(TRAIN, arguments(run_inputs, folder), env=fault)
    assert job.wait(timeout_s=180) == [CHECK_FAILED] * 2, job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith(("error", "Traceback"))]
    assert "gradients are not finite at step 5" in line and "the last checkpoint is kept" in line and "train.lr" in line
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-000003"
    assert not (folder / "export").exists()


def test_no_wall_clock_is_read():
    """A clock that jumps (NTP, summer time, a resumed machine) must not end a job, nor hide that it hangs."""
    for path in (ROOT / "homodistil").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in ("time.time", "datetime.now", "datetime.utcnow"), f"{path}:{node.lineno}"


def test_a_clock_that_jumps_changes_nothing(server, run_inputs, reference, tmp_path):
    job = server.start("fault_jobs:train_with_jumping_clock", [arguments(run_inputs, tmp_path / "run")])
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert differences(result(tmp_path / "run"), result(reference)) == []
