"""What job.sh does on each way a job can end: which are requeued, which not, how often. Ranks are one-line commands."""

import time

import pytest
from cluster import ROOT

from homodistil.exit_codes import CHECK_FAILED, FAILED, RANK_LOST, STOPPED, USER_ERROR

FRAME = ROOT / "tests" / "slurm" / "policy.sbatch"


@pytest.fixture
def submit(cluster, site):
    jobs = []

    def submit(command: str, ranks: int = 1, **env: str) -> str:
        options = ["--nodes=1", f"--ntasks-per-node={ranks}", "--time=5"]
        jobs.append(cluster.submit(FRAME, ["bash", "-c", command], options, site | env))
        return jobs[-1]

    yield submit
    cluster.run("scancel", *jobs)


def _wait_until(condition, cluster, job):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.1)


def test_failures_are_final_and_losses_are_bounded(cluster, submit):
    """A rank that failed by itself decides, although the others then say that a rank was lost."""
    failed = {code: submit(f"exit {code}") for code in (USER_ERROR, CHECK_FAILED, FAILED)}
    mixed = submit("exit $((SLURM_PROCID ? 2 : 76))", ranks=2)
    lost, killed = submit(f"exit {RANK_LOST}"), submit("kill -KILL $$")
    for code, job in (*failed.items(), (USER_ERROR, mixed)):
        assert cluster.wait(job, timeout_s=60) == "FAILED", cluster.output(job)
        assert f"failed (code {code}), not requeued" in cluster.output(job) and cluster.restarts(job) == 0
    for code, job in ((RANK_LOST, lost), (137, killed)):
        assert cluster.wait(job, timeout_s=90) == "FAILED", cluster.output(job)
        assert f"rank lost (code {code}) for the 2th time without a new checkpoint" in cluster.output(job)
        assert cluster.restarts(job) == 1  # MAX_LOSS_REQUEUES of the site


def test_stops_are_requeued_and_bounded_over_all(cluster, submit):
    always = submit(f"exit {STOPPED}", MAX_RESTARTS="1")
    once = submit(f"exit $((SLURM_RESTART_COUNT ? 0 : {STOPPED}))")
    assert cluster.wait(always, timeout_s=90) == "FAILED", cluster.output(always)
    assert f"code {STOPPED} after 1 restarts (MAX_RESTARTS), not requeued" in cluster.output(always)
    assert cluster.wait(once, timeout_s=90) == "COMPLETED", cluster.output(once)


def test_signals_before_the_ranks_can_handle_them(cluster, submit, tmp_path):
    """USR1 to ranks that are starting, and to the batch shell alone (--signal=B:USR1@N): requeued. scancel: over."""
    wait = f'cd {tmp_path}; [ -n "${{SLURM_RESTART_COUNT:-}}" ] || {{ touch $SLURM_JOB_ID; exec sleep 120; }}'
    to_ranks, to_shell, cancelled = submit(wait), submit(wait), submit(wait)
    for job in (to_ranks, to_shell, cancelled):
        _wait_until((tmp_path / job).exists, cluster, job)
    cluster.run("scancel", "--signal=USR1", to_ranks)
    cluster.run("scancel", "--batch", "--signal=USR1", to_shell)
    cluster.run("scancel", cancelled)
    assert cluster.wait(cancelled, timeout_s=60) == "CANCELLED" and cluster.restarts(cancelled) == 0
    for job in (to_ranks, to_shell):
        assert cluster.wait(job, timeout_s=90) == "COMPLETED", cluster.output(job)
        assert "stopped on request; requeued" in cluster.output(job) and cluster.restarts(job) == 1
