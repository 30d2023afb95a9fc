"""SIGTERM, SIGUSR1: all ranks leave at the same step, behind a checkpoint, with code 75; a second one ends at once."""

import re
import signal
import time

import psutil
from support.small_job import TRAIN, arguments, differences, result

from homodistil.distributed.exit_codes import STOPPED, of_signal


def _wait_for_step(job, folder, step):
    path = folder / "metrics.jsonl"
    while job.is_running() and not (path.is_file() and f'"step": {step},' in path.read_text()):
        time.sleep(0.01)
    assert job.is_running(), job.output()


FROZEN = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=3:action=stop"}
"""Rank 1 stands still in the third step of this start, until it gets SIGCONT, so that a signal meets the job there."""


def _wait_until_frozen(job):
    while psutil.Process(job.pids[1]).status() != psutil.STATUS_STOPPED:
        assert job.is_running(), job.output()
        time.sleep(0.01)


def _stopped_at(job) -> int:
    found = re.findall(r"^stopped by (\w+) at step (\d+) of 10; run.resume=auto goes on", job.output(), re.MULTILINE)
    assert len(found) == 1 and "error" not in job.output() and "Traceback" not in job.output(), job.output()
    return int(found[0][1])


def test_stopped_runs_go_on_bitwise(server, run_inputs, reference, tmp_path):
    """A SIGTERM to one rank, later a SIGUSR1 to the other while it waits for the first one; then to the end."""
    folder = tmp_path / "run"
    own = arguments(run_inputs, folder, "run.resume=auto")
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "train.step:rank=1:hit=4:action=term"})
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    # In step 4; known to all ranks at its boundary; looked at one later.
    assert _stopped_at(job) == 5 and "SIGTERM" in job.output()
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-000005"
    job = server.start(TRAIN, own, env=FROZEN)
    _wait_until_frozen(job)
    job.kill(0, signal.SIGUSR1)
    job.kill(1, signal.SIGCONT)
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    step = _stopped_at(job)
    assert 8 <= step < 10 and (folder / "checkpoints" / "latest").read_text().strip() == f"step-{step:06d}"
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    # The step at which a run was stopped leaves a checkpoint more, and nothing else.
    assert differences(result(folder), result(reference)) == []


def test_the_stop_comes_one_step_late_and_on_all_ranks_alike(server):
    job = server.start("fault_jobs:agree", [4, 9], num_ranks=3)
    assert job.wait(timeout_s=180) == [0, 0, 0], job.output()
    assert job.output().count(f"agreed on {signal.SIGUSR1} at step 5") == 3, job.output()


def test_a_signal_in_the_very_last_step_stops_all_as_well(server):
    job = server.start("fault_jobs:agree", [4, 4], num_ranks=3)
    assert job.wait(timeout_s=180) == [STOPPED] * 3, job.output()


def test_a_second_signal_ends_at_once_even_in_a_hanging_collective(server, run_inputs, tmp_path):
    folder = tmp_path / "run"
    fault = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=hang"}
    job = server.start(TRAIN, arguments(run_inputs, folder), env=fault)
    _wait_for_step(job, folder, 4)
    for _ in range(3):  # copies, as a launcher and its process group send them, are one request
        job.kill(None, signal.SIGTERM)
    time.sleep(3)
    assert job.codes() == [None, None]
    job.kill(None, signal.SIGTERM)
    start = time.monotonic()
    assert job.wait(timeout_s=60) == [of_signal(signal.SIGTERM)] * 2
    assert time.monotonic() - start < 10
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-000003"


def test_outside_training_one_signal_is_enough(server):
    job = server.start("fault_jobs:sleep_outside_training", num_ranks=1)
    while "ready" not in job.output():
        time.sleep(0.02)
    job.kill(0, signal.SIGUSR1)
    assert job.wait(timeout_s=60) == [STOPPED]
    assert "stopped by SIGUSR1 outside training; run it again to go on" in job.output()


def test_forked_children_have_none_of_it(server):
    for ended in ("pool_inside_handlers", "children_ended_at_once"):
        job = server.start(f"fault_jobs:{ended}", num_ranks=1)
        assert job.wait(timeout_s=60) == [0], job.output()


def test_a_stop_that_arrives_during_a_fork_is_not_lost(server):
    job = server.start("fault_jobs:be_stopped_during_a_fork", num_ranks=1)
    assert job.wait(timeout_s=30) == [STOPPED], job.output()
    assert "stopped by SIGTERM outside training" in job.output()
    assert "Traceback" not in job.output()


def test_a_stop_that_another_thread_takes_ends_what_the_main_one_waits_for(server):
    job = server.start("fault_jobs:sleep_while_another_thread_takes_the_signal", num_ranks=1)
    assert job.wait(timeout_s=30) == [STOPPED], job.output()
    assert "stopped by SIGTERM outside training" in job.output()


def test_the_correction_of_the_teacher_leaves_nothing_behind(server, run_inputs, tmp_path):
    overrides = ("teacher.correction_steps=20", f"data.cache_dir={tmp_path / 'cache'}")
    fault = {"HOMODISTIL_FAULT": "train.step:rank=0:hit=3:action=term"}
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run", *overrides), env=fault)
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    assert "stopped by SIGTERM while correcting the teacher, which the next run starts anew" in job.output()
    assert not list((tmp_path / "cache" / "teachers").iterdir())


def test_workers_survive_the_signal_that_a_launcher_sends_to_the_whole_tree(server, run_inputs, reference, tmp_path):
    folder = tmp_path / "run"
    own = arguments(run_inputs, folder, "run.resume=auto", "data.workers=1")
    job = server.start(TRAIN, own, env=FROZEN)
    _wait_until_frozen(job)
    trees = [psutil.Process(pid) for pid in job.pids]
    workers = [worker for rank in trees for worker in rank.children(recursive=True)]
    assert len(workers) >= 2
    for process in (*workers, *trees):
        process.terminate()
    job.kill(1, signal.SIGCONT)
    assert job.wait(timeout_s=180) == [STOPPED, STOPPED], job.output()
    assert 3 <= _stopped_at(job) < 10
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()  # ends, although its workers do not mind SIGTERM
    assert differences(result(folder), result(reference)) == []
