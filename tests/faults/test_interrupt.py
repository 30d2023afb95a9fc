"""Ctrl-C: the first stops all ranks behind a checkpoint, whatever the launcher sends after it; a second ends at once.

In a terminal SIGINT reaches the whole foreground process group. Launchers print lines of their own about it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launch import free_port
from small_job import TRAIN, arguments, differences, result
from test_stop import _wait_for_step

from homodistil.exit_codes import STOPPED, of_signal

STOPPED_LINE = r"^stopped by SIGINT at step (\d+) of \d+; run.resume=auto goes on from its checkpoint: add it to the"


def test_ctrl_c_and_the_launchers_sigterm_are_one_request(server, materials, reference, tmp_path):
    """As `deepspeed` does it: SIGINT to all ranks, SIGTERM some milliseconds behind. Then on to the end, bitwise."""
    folder = tmp_path / "run"
    command = arguments(materials, folder, "run.resume=auto")
    job = server.start(TRAIN, command)
    _wait_for_step(job, folder, 7)
    job.kill(None, signal.SIGINT)
    job.kill(None, signal.SIGTERM)
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    (step,) = re.findall(STOPPED_LINE, job.output(), re.MULTILINE)
    assert "Traceback" not in job.output() and "error" not in job.output(), job.output()
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{int(step):06d}"
    job = server.start(TRAIN, command)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert differences(result(folder), result(reference)) == []


def test_a_late_sigterm_of_the_launcher_ends_nothing_and_a_second_ctrl_c_everything(server, materials, tmp_path):
    """DeepSpeed's launcher sends it to a rank once the rank before it has ended, however long that takes."""
    folder = tmp_path / "run"
    fault = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=hang"}
    job = server.start(TRAIN, arguments(materials, folder), env=fault)
    _wait_for_step(job, folder, 4)
    time.sleep(0.5)
    job.kill(None, signal.SIGINT)
    time.sleep(2.5)
    job.kill(None, signal.SIGTERM)
    time.sleep(0.5)
    assert job.codes() == [None, None], job.output()
    job.kill(None, signal.SIGINT)
    assert job.wait(timeout_s=60) == [of_signal(signal.SIGINT)] * 2
    assert "Traceback" not in job.output(), job.output()


def test_ctrl_c_while_the_teacher_is_corrected(server, materials, tmp_path):
    job = server.start(TRAIN, arguments(materials, tmp_path / "run", "teacher.correction_steps=100000"))
    deadline = time.monotonic() + 120
    while "step 1/100000" not in job.output() and job.is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.kill(None, signal.SIGINT)
    assert job.wait(timeout_s=60) == [STOPPED, STOPPED], job.output()
    lines = re.findall("^stopped by SIGINT while correcting .*$", job.output(), re.MULTILINE)
    assert len(lines) == 1 and lines[0].endswith("to go on, type the same command with run.resume=auto")
    assert "Traceback" not in job.output(), job.output()


def test_a_notebook_gets_a_keyboard_interrupt_and_can_go_on_in_the_same_process(server, materials, tmp_path):
    """job.run in a process of somebody else's: interrupted, then run again (fault_jobs.py)."""
    folder = tmp_path / "run"
    job = server.start("fault_jobs:interrupted_then_resumed", [arguments(materials, folder)], num_ranks=1)
    _wait_for_step(job, folder, 4)
    job.kill(0, signal.SIGINT)
    assert job.wait(timeout_s=120) == [0], job.output()
    assert "caught Interrupted: stopped by SIGINT at step" in job.output()
    assert "resumed: 1 row" in job.output(), job.output()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_two_runs_in_one_process(server, materials, tmp_path, num_ranks):
    folders = [tmp_path / "first", tmp_path / "second"]
    commands = [arguments(materials, folder, "train.steps=4") for folder in folders]
    job = server.start("fault_jobs:run_twice", commands, num_ranks=num_ranks)
    assert job.wait(timeout_s=180) == [0] * num_ranks, job.output()
    first, second = ((folder / "export" / "model.safetensors").read_bytes() for folder in folders)
    assert first == second


def _started(launcher: list[str], command: list[str], log) -> subprocess.Popen:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [*launcher, str(TRAIN), *command]
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.parametrize(
    "launcher",
    [
        "deepspeed --num_accelerators 2 --master_port {port}",
        pytest.param("torchrun --nproc_per_node=2 --master_port={port}", marks=pytest.mark.full),
        pytest.param("{python}", marks=pytest.mark.full),
    ],
)
def test_ctrl_c_under_a_real_launcher(materials, tmp_path, launcher):
    """SIGINT to the process group, as a terminal does. DeepSpeed's and torch's launchers show their own tracebacks."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    words = launcher.format(port=free_port(), python=sys.executable).split()
    with open(log, "w") as file:
        process = _started(words, arguments(materials, folder, "train.steps=100000"), file)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and '"step": 7,' in metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    while not re.search(STOPPED_LINE, log.read_text(), re.MULTILINE) and time.monotonic() < deadline:
        time.sleep(0.1)  # DeepSpeed's first process leaves before its children
    (step,) = re.findall(STOPPED_LINE, log.read_text(), re.MULTILINE)
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{int(step):06d}"
    assert "homodistil/trainer.py" not in log.read_text(), log.read_text()  # no traceback of a rank
