"""What job.sh does on each way a job can end: which are requeued, which not, how often. Ranks are one-line commands."""

import signal
import time

import pytest
from slurm_cluster import ROOT

from homodistil.distributed.exit_codes import CHECK_FAILED, FAILED, RANK_LOST, STOPPED, USER_ERROR, of_signal

FRAME = ROOT / "tests" / "slurm" / "policy.sbatch"
ASLEEP = ("to_ranks", "to_shell", "cancelled", "by_slurm")
"""Jobs that sleep in their first start, until something is done to them."""
MISTAKE = "error: run.dir: is not empty"


@pytest.fixture(scope="module")
def jobs(cluster, site, tmp_path_factory):
    """Name -> job. All are submitted at once: most of their time is waiting behind a requeue."""
    folder = tmp_path_factory.mktemp("policy")
    sleeping = f'cd {folder}; [ -n "${{SLURM_RESTART_COUNT:-}}" ] || {{ touch $SLURM_JOB_ID; exec sleep 120; }}'

    def submit(command: str, ranks: int = 1, **env: str) -> str:
        options = ["--nodes=1", f"--ntasks-per-node={ranks}", "--time=5"]
        return cluster.submit(FRAME, ["bash", "-c", command], options, site | env)

    submitted = {name: submit(sleeping) for name in ASLEEP}
    submitted |= {str(code): submit(f"echo '{MISTAKE}'; exit {code}") for code in (USER_ERROR, CHECK_FAILED, FAILED)}
    submitted |= {"lost": submit(f"exit {RANK_LOST}"), "killed": submit("kill -KILL $$")}
    submitted["stopped"] = submit(f"exit {STOPPED}", MAX_RESTARTS="1")
    submitted["stopped_once"] = submit(f"exit $((SLURM_RESTART_COUNT ? 0 : {STOPPED}))")
    submitted["mixed"] = submit(f"exit $((SLURM_PROCID ? {USER_ERROR} : {RANK_LOST}))", ranks=2)
    for name in ASLEEP:
        _wait_until((folder / submitted[name]).exists, cluster, submitted[name])
    cluster.run("scancel", "--signal=USR1", submitted["to_ranks"])
    cluster.run("scancel", "--batch", "--signal=USR1", submitted["to_shell"])
    cluster.run("scancel", submitted["cancelled"])
    cluster.run("scontrol", "requeue", submitted["by_slurm"])
    return submitted


def _wait_until(condition, cluster, job):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.1)


@pytest.mark.parametrize("code", [USER_ERROR, CHECK_FAILED, FAILED])
def test_failures_are_final_and_said_in_the_words_of_the_rank(cluster, jobs, code):
    _is_final(cluster, jobs[str(code)], code)
    assert f"not requeued: {MISTAKE}\n" in cluster.output(jobs[str(code)])


def test_the_rank_that_failed_by_itself_decides(cluster, jobs):
    """The others then say that a rank was lost, with a higher code."""
    _is_final(cluster, jobs["mixed"], USER_ERROR)


def _is_final(cluster, job, code):
    assert cluster.wait(job, timeout_s=90) == "FAILED", cluster.output(job)
    assert f"failed (code {code}), not requeued" in cluster.output(job) and cluster.restarts(job) == 0


@pytest.mark.parametrize(("name", "code"), [("lost", RANK_LOST), ("killed", of_signal(signal.SIGKILL))])
def test_lost_ranks_are_requeued_as_often_as_the_site_says(cluster, jobs, name, code):
    assert cluster.wait(jobs[name], timeout_s=90) == "FAILED", cluster.output(jobs[name])
    assert f"rank lost (code {code}), 2 losses without a new checkpoint" in cluster.output(jobs[name])
    assert cluster.restarts(jobs[name]) == 1


def test_stops_are_requeued_and_bounded_over_all(cluster, jobs):
    assert cluster.wait(jobs["stopped"], timeout_s=90) == "FAILED"
    assert f"code {STOPPED} after 1 restarts (MAX_RESTARTS), not requeued" in cluster.output(jobs["stopped"])
    assert cluster.wait(jobs["stopped_once"], timeout_s=90) == "COMPLETED", cluster.output(jobs["stopped_once"])


@pytest.mark.parametrize("name", ["to_ranks", "to_shell"])
def test_a_signal_that_no_rank_handles_yet_requeues_as_well(cluster, jobs, name):
    """USR1 to ranks that are starting, or to the batch shell alone (--signal=B:USR1@N)."""
    assert cluster.wait(jobs[name], timeout_s=90) == "COMPLETED", cluster.output(jobs[name])
    assert "stopped on request; requeued" in cluster.output(jobs[name]) and cluster.restarts(jobs[name]) == 1


def test_what_slurm_requeues_starts_again_by_itself(cluster, jobs):
    assert cluster.wait(jobs["by_slurm"], timeout_s=90) == "COMPLETED", cluster.output(jobs["by_slurm"])
    output = cluster.output(jobs["by_slurm"])
    assert "ended by SLURM" in output and "starts again by itself" in output and "start 1: " in output
    assert cluster.restarts(jobs["by_slurm"]) == 1


def test_a_cancelled_job_is_over(cluster, jobs):
    assert cluster.wait(jobs["cancelled"], timeout_s=60) == "CANCELLED" and cluster.restarts(jobs["cancelled"]) == 0


def test_a_node_that_fails_is_not_the_end(cluster, site, tmp_path, jobs):
    """SLURM itself starts the job again (--requeue). ReturnToService: the node is back with its next sign of life."""
    command = f'[ -n "${{SLURM_RESTART_COUNT:-}}" ] || {{ touch {tmp_path}/$SLURM_PROCID; exec sleep 120; }}'
    job = cluster.submit(FRAME, ["bash", "-c", command], ["--nodes=2", "--time=5"], site)
    _wait_until((tmp_path / "1").exists, cluster, job)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    assert cluster.wait(job, timeout_s=90) == "COMPLETED", cluster.output(job)
    assert cluster.restarts(job) == 1
