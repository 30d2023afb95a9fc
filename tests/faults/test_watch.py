"""A rank that is dead, stopped, stuck or failing ends the job with one line that names it, and with exit code 76."""

import re
import signal
import time

import pytest
from support.small_job import TRAIN, arguments

from homodistil.distributed.exit_codes import RANK_LOST, USER_ERROR
from homodistil.distributed.watchdog.failure_detector import SILENT_S, FailureDetector
from homodistil.distributed.watchdog.heartbeat import Heartbeat


def _errors(job) -> list[str]:
    """Without the tag that lines of ranks other than 0 bear."""
    lines = [re.sub(r"^\[rank \d+ \S+\] ", "", line) for line in job.output().splitlines()]
    return [line for line in lines if line.startswith(("error", "Traceback", "[W", "frame #"))]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_is_named_by_the_others(server, run_inputs, tmp_path, dead):
    fault = {"HOMODISTIL_FAULT": f"train.step:rank={dead}:hit=5"}
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run"), env=fault)
    while job.codes()[dead] is None:
        time.sleep(0.02)
    died_s = time.monotonic()
    codes = job.wait(timeout_s=180)
    assert time.monotonic() - died_s < 30
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == RANK_LOST
    (line,) = _errors(job)
    assert f"error: rank {dead} (host " in line and f"pid {job.pids[dead]}) is gone: its process has ended" in line
    assert re.search(r"last seen in step \d, \w+ at homodistil/\S+:\d+ \S+, \d s ago", line), line
    assert "run.resume=auto resumes from the last checkpoint" in line
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-000003"


def test_a_rank_that_hangs_is_named_and_not_those_that_wait_for_it(server):
    job = server.start("fault_jobs:wait_for_rank", ["sleep", 6.0], num_ranks=3)
    assert job.wait(timeout_s=180) == [RANK_LOST] * 3
    line = _errors(job)[0]
    assert f"error: rank 1 (host {_host()}, pid {job.pids[1]}) is stuck in step 3, training" in line
    assert "run.rank_timeout_s is 6" in line and "waiting for it: rank 0, 2" in line
    assert "rank 0 (host" not in line and "rank 2 (host" not in line


def test_a_long_phase_is_waited_for(server):
    job = server.start("fault_jobs:wait_for_rank", ["long", 6.0])
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert job.output().count("all is well") == 2


def test_a_rank_that_leaves_without_a_word_is_missed(server):
    job = server.start("fault_jobs:wait_for_rank", ["exit", 100.0])
    assert job.wait(timeout_s=180) == [RANK_LOST, 0]
    assert "rank 1" in _errors(job)[0] and "is gone" in _errors(job)[0]


def test_an_error_of_one_rank_ends_all_with_its_code_and_one_line(server):
    job = server.start("fault_jobs:wait_for_rank", ["fail", 100.0], num_ranks=3)
    assert job.wait(timeout_s=180) == [USER_ERROR] * 3
    assert _errors(job) == ["error: rank 1: run.dir: rank 1 alone cannot write it; mend it"]


@pytest.mark.full
def test_a_stopped_process_is_named(server):
    job = server.start("fault_jobs:wait_for_rank", ["sleep", 100.0], num_ranks=3)
    time.sleep(5)
    job.kill(1, signal.SIGSTOP)
    while job.codes()[0] is None or job.codes()[2] is None:
        time.sleep(0.1)
    job.kill(1)
    assert [job.wait(10)[rank] for rank in (0, 2)] == [RANK_LOST] * 2
    assert "rank 1" in _errors(job)[0] and "stopped by a signal" in _errors(job)[0]


@pytest.mark.full
def test_a_hang_of_the_real_job(server, run_inputs, tmp_path):
    fault = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=hang"}
    own = arguments(run_inputs, tmp_path / "run", "run.rank_timeout_s=20")
    job = server.start(TRAIN, own, env=fault)
    assert job.wait(timeout_s=300) == [RANK_LOST] * 2
    assert (
        "rank 1" in _errors(job)[0]
        and "stuck in step 4, training at homodistil/distributed/fault_injection.py" in _errors(job)[0]
    )


def test_an_unexpected_exception_keeps_its_traceback_and_the_others_name_the_rank(server, run_inputs, tmp_path):
    fault = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=2:action=raise"}
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run"), env=fault)
    assert job.wait(timeout_s=180) == [RANK_LOST, 1]
    assert "error: rank 1 failed: RuntimeError: injected at train.step" in job.output(0)
    assert "Traceback" in job.output(1) and "Traceback" not in job.output(0)


# -- the judge alone: what no test should wait for


def _host() -> str:
    import socket

    return socket.gethostname()


def _sign(beat=1, count=5, host="far", idle_s=0.0, waits=False, is_long=False, end=None) -> Heartbeat:
    return Heartbeat(
        beat, host, 1, 99, count, 7, "training", is_long, idle_s, "homodistil/data/prefetch.py:1 f", waits, end
    )


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr("homodistil.distributed.watchdog.failure_detector.time.monotonic", lambda: now[0])
    return now


def test_silence_from_another_machine_is_noticed_after_its_time(clock):
    judge = FailureDetector(0, 1800)
    judge.see(0, _sign(host="near"))
    judge.see(1, _sign())
    clock[0] += SILENT_S - 1
    judge.see(1, _sign())  # the same sign again is no sign of life
    assert judge.gone() is None
    clock[0] += 2
    assert "rank 1 (host far, pid 99) is gone: no heartbeat for 15 s" in judge.gone()
    judge.reset()
    assert judge.gone() is None
    clock[0] += SILENT_S + 1
    judge.see(1, _sign(beat=2))
    assert judge.gone() is None
    judge.lose(1)
    assert "its connection has closed" in judge.gone()


def test_who_has_done_all_is_not_missed(clock):
    judge = FailureDetector(0, 1800)
    judge.see(1, _sign(end=(0, "")))
    judge.lose(1)
    clock[0] += 1e6
    assert judge.gone() is None and judge.first_failure() is None and judge.stuck() is None


@pytest.mark.parametrize(
    ("signs", "blamed"),
    [
        ([_sign(count=5), _sign(count=4), _sign(count=5)], {1}),
        ([_sign(waits=True), _sign(waits=True), _sign()], {2}),
        ([_sign(waits=True), _sign(waits=True), _sign(waits=True)], {0, 1, 2}),
        ([_sign(count=4), _sign(count=3), _sign(count=3)], {1, 2}),
        ([_sign(count=4, is_long=True), _sign(), _sign()], set()),
    ],
)
def test_who_is_stuck(clock, signs, blamed):
    judge = FailureDetector(0, 1800)
    for rank, sign in enumerate(signs):
        judge.see(rank, sign._replace(idle_s=1799.0))
    assert judge.stuck() is None
    for rank, sign in enumerate(signs):
        judge.see(rank, sign._replace(beat=2, idle_s=1801.0))
    found = judge.stuck() or ""
    assert {rank for rank in range(3) if f"rank {rank} (host" in found} == blamed


def test_one_rank_that_makes_progress_keeps_nobody_else_from_being_blamed_only_itself(clock):
    judge = FailureDetector(0, 1800)
    judge.see(0, _sign(count=9, idle_s=1.0))
    judge.see(1, _sign(count=8, idle_s=5000.0))
    assert "rank 1" in judge.stuck()
    judge.see(1, _sign(beat=2, count=8, idle_s=10.0))
    assert judge.stuck() is None
