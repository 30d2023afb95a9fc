"""Before the first step: neither a lock that a killed job left nor a rank that never comes holds a job up for ever."""

import threading
import time

import pytest

from homodistil.distributed.exit_codes import RANK_LOST
from homodistil.engine import native_ops


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(native_ops, "STALE_AFTER_S", 1.0)


def _wait_for(job, word):
    while word not in job.output():
        assert job.is_running(), job.output()
        time.sleep(0.02)


def test_a_lock_without_a_holder_is_removed_with_a_warning(tmp_path, patience, capsys):
    (tmp_path / "lock").touch()
    native_ops._wait_or_remove(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    assert f"warning: {tmp_path / 'lock'} was left by a process that has ended" in capsys.readouterr().err


def test_a_lock_is_waited_for_as_long_as_its_holder_lives(server, tmp_path, patience):
    job = server.start("fault_jobs:hold_lock", [str(tmp_path / "lock")], num_ranks=1)
    _wait_for(job, "held")
    waiting = threading.Thread(target=native_ops._wait_or_remove, args=(tmp_path / "lock",))
    waiting.start()
    time.sleep(2.5)
    assert waiting.is_alive() and (tmp_path / "lock").exists()
    job.kill()
    waiting.join(timeout=20)
    assert not waiting.is_alive() and not (tmp_path / "lock").exists()


def test_the_turn_of_a_killed_process_passes_on(server, tmp_path):
    first, second = (server.start("fault_jobs:be_alone", [str(tmp_path)], num_ranks=1) for _ in range(2))
    while not (there := [job for job in (first, second) if "alone" in job.output()]):
        time.sleep(0.02)
    time.sleep(0.5)
    (other,) = {first, second} - set(there)
    assert "alone" not in other.output()
    there[0].kill()
    _wait_for(other, "alone")
    other.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_in_vain_for_others_says_so(server, rank):
    job = server.start("fault_jobs:join_where_others_are_missing", [rank, 3], num_ranks=1)
    assert job.wait(timeout_s=90) == [RANK_LOST], job.output()
    lines = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"rank {rank} of 3 could not join the others" in lines[0], job.output()
    assert "run.rank_timeout_s (3 s)" in lines[0] and "Traceback" not in job.output(), job.output()
