"""Ctrl-C: SIGINT to the whole foreground process group ends all ranks behind a checkpoint, whatever launched them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.small_job import TRAIN, arguments, differences, result

from homodistil.distributed.exit_codes import STOPPED, of_signal
from homodistil.distributed.free_port import free_port

SCRIPTS = TRAIN.parent
BIN = Path(sys.executable).parent


def wait_for(is_true, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def wait_for_step(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    wait_for(lambda: path.is_file() and f'"step": {step},' in path.read_text())


def stopped_at(output: str) -> tuple[int, list[str]]:
    """(step, what to type) of the one line."""
    pattern = r"^stopped by SIGINT at step (\d+) of \d+; run.resume=auto goes on from its checkpoint: (.*)$"
    lines = re.findall(pattern, output, re.MULTILINE)
    assert len(lines) == 1 and output.count("stopped by") == 1, output
    return int(lines[0][0]), shlex.split(lines[0][1])


def interrupted(command: list[str], folder: Path, step: int, out: Path) -> str:
    """What is printed when the process group of `command` gets SIGINT behind `step`, as from a terminal."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    with open(out, "w") as file:
        job = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=environment,
            cwd=SCRIPTS.parent,
            # As a terminal starts it: who runs these tests in the background may have SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for_step(folder, step)
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if str(TRAIN) in p.cmdline()]
        os.killpg(job.pid, signal.SIGINT)
        job.wait(timeout=60)
        # The deepspeed command leaves at once; the ranks go on to their checkpoint without it.
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    finally:
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == job.pid:
                    process.kill()
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
    return out.read_text()


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT"],
    "plain": [sys.executable],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_under_a_launcher_saves_and_says_what_to_type(launcher, run_inputs, tmp_path):
    folder = tmp_path / "run"
    own = arguments(run_inputs, folder, "train.steps=2000", "train.save_every_steps=1000", "pruning.schedule=none")
    prefix = [str(free_port()) if part == "PORT" else part for part in LAUNCHERS[launcher]]
    output = interrupted([*prefix, str(TRAIN), *own], folder, 4, tmp_path / "output.txt")
    step, command = stopped_at(output)
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{step:06d}"
    assert not re.search(r"File .*(launcher/train|homodistil/)", output), output  # no traceback of a rank
    assert command[-1] == "run.resume=auto" and command[:-1][-len(own) - 1 :] == [str(TRAIN), *own]
    assert launcher == "plain" or command[0].endswith(launcher) and prefix[1:] == command[1 : len(prefix)]


FROZEN = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=stop"}
"""Rank 1 stands still in its fifth step until it gets SIGCONT: a signal meets the job there, and not behind its end."""


def wait_until_frozen(job):
    wait_for(lambda: psutil.Process(job.pids[1]).status() == psutil.STATUS_STOPPED)


def test_all_ranks_leave_with_75_although_the_launchers_signals_follow(server, run_inputs, reference, tmp_path):
    """SIGINT to all, SIGTERM to one at once and to the other when the first has gone, as deepspeed's launcher does."""
    folder = tmp_path / "run"
    own = arguments(run_inputs, folder, "run.resume=auto")
    job = server.start(TRAIN, own, env=FROZEN)
    wait_until_frozen(job)
    job.kill(None, signal.SIGINT)
    job.kill(0, signal.SIGTERM)
    job.kill(1, signal.SIGCONT)
    wait_for(lambda: job.codes()[0] is not None)
    job.kill(1, signal.SIGTERM)
    assert job.wait(timeout_s=60) == [STOPPED, STOPPED], job.output()
    step, command = stopped_at(job.output())
    assert "Traceback" not in job.output() and "error" not in job.output(), job.output()
    assert command[-len(own) :] == [*own[:-1], "run.resume=auto"]
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert f"resumed from step {step} (checkpoint {folder}/checkpoints/step-{step:06d})" in job.output(0)
    assert differences(result(folder), result(reference)) == []


def test_a_second_ctrl_c_ends_at_once_even_in_a_hanging_collective(server, run_inputs, tmp_path):
    folder = tmp_path / "run"
    fault = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=hang"}
    job = server.start(TRAIN, arguments(run_inputs, folder), env=fault)
    wait_for_step(folder, 4)
    job.kill(None, signal.SIGINT)
    time.sleep(2.5)
    job.kill(None, signal.SIGTERM)  # the launcher's answer to the first
    time.sleep(0.5)
    assert job.codes() == [None, None]
    job.kill(None, signal.SIGINT)
    assert job.wait(timeout_s=20) == [of_signal(signal.SIGINT)] * 2


@pytest.mark.parametrize("script", ["train", "prepare_data", "glue", "squad", "plan", "report"])
def test_ctrl_c_during_imports_is_one_line(server, script):
    job = server.start("interrupt_jobs:script_with_slow_imports", [str(SCRIPTS / f"{script}.py")])
    wait_for(lambda: job.output().count("importing") == 2)
    job.kill(None, signal.SIGINT)
    assert job.wait(timeout_s=20) == [STOPPED, STOPPED], job.output()
    lines = [line for line in job.output().splitlines() if line and line != "importing"]
    assert lines == ["stopped by SIGINT; the same command starts it again"]


def test_ctrl_c_while_data_is_prepared_ends_with_one_line_that_is_true(server, run_inputs, tmp_path):
    own = arguments(run_inputs, tmp_path / "run")
    job = server.start("interrupt_jobs:train_with_slow_preparation", [own])
    wait_for(lambda: "preparing slowly" in job.output())
    job.kill(None, signal.SIGINT)
    assert job.wait(timeout_s=20) == [STOPPED, STOPPED], job.output()
    assert "Traceback" not in job.output() and job.output().count("stopped by SIGINT outside training; ") == 1
    assert re.search(r"run it again with run.resume=auto to go on: .* run.resume=auto$", job.output(), re.MULTILINE)


def test_workers_survive_it(server, run_inputs, tmp_path):
    folder = tmp_path / "run"
    job = server.start(TRAIN, arguments(run_inputs, folder, "data.workers=1"), env=FROZEN)
    wait_until_frozen(job)
    trees = [psutil.Process(pid) for pid in job.pids]
    workers = [worker for rank in trees for worker in rank.children(recursive=True)]
    assert len(workers) >= 2
    for process in (*workers, *trees):
        process.send_signal(signal.SIGINT)
    job.kill(1, signal.SIGCONT)
    assert job.wait(timeout_s=60) == [STOPPED, STOPPED], job.output()
    assert stopped_at(job.output())[0] >= 4
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)


def test_a_caller_of_run_sees_a_keyboard_interrupt_and_may_go_on(server, run_inputs, reference, tmp_path):
    folder = tmp_path / "run"
    job = server.start("interrupt_jobs:notebook", [arguments(run_inputs, folder)], env=FROZEN)
    wait_until_frozen(job)
    job.kill(None, signal.SIGINT)
    job.kill(1, signal.SIGCONT)
    assert job.wait(timeout_s=120) == [0, 0], job.output()
    assert re.search(r"KeyboardInterrupt: stopped by SIGINT at step \d+ of 10; run.resume=auto goes on", job.output())
    assert differences(result(folder), result(reference)) == []
