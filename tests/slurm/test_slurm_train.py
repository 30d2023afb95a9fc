"""launcher/slurm/train.sbatch on a real SLURM of two nodes: stopped, requeued, to the end, refused.

The job is the small one of the fault tests, with compensated events. The quickstart itself: test_slurm_quickstart.py.
"""

import re
import time
from pathlib import Path

import pytest
from slurm_cluster import ROOT
from support.small_job import arguments, differences, result

from homodistil.distributed.exit_codes import USER_ERROR

TRAIN = ROOT / "launcher" / "slurm" / "train.sbatch"
NODES = ["--nodes=2", "--time=10"]
PATIENCE_S = 240  # other lanes use the processor as well
COMPENSATED = ["pruning.compensation=full", "pruning.compensation_sequences=24", "pruning.interval_steps=4"]
FROZEN = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=6:action=stop"}
"""Rank 1 stands still in the sixth step of every start, so that a signal meets it there. It goes on by SIGCONT.

Asked in step 6 of 16, the ranks stop behind step 7. The second start stands still in step 13 and stops behind step 14:
SLURM asks before it requeues. The third one has two steps left.
"""


@pytest.fixture(scope="module")
def whole(server, run_inputs, tmp_path_factory):
    """Run folder of the same job, uninterrupted, without SLURM."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = server.start(ROOT / "launcher" / "train.py", arguments(run_inputs, folder, *COMPENSATED))
    assert job.wait(timeout_s=PATIENCE_S) == [0, 0], job.output()
    return folder


def _wait_for_step(cluster, job, folder, step):
    path, deadline = folder / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.05)
    time.sleep(0.5)  # from the line of the step before to the fault


def test_stopped_and_requeued_in_the_middle_of_pruning_it_ends_bitwise(cluster, site, run_inputs, whole, tmp_path):
    folder = tmp_path / "run"
    job = cluster.submit(TRAIN, arguments(run_inputs, folder, *COMPENSATED), NODES, site | FROZEN)
    _wait_for_step(cluster, job, folder, 5)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.run("scancel", "--signal=CONT", job)
    _wait_for_step(cluster, job, folder, 12)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, timeout_s=PATIENCE_S) == "COMPLETED", cluster.output(job)
    output = cluster.output(job)
    assert cluster.restarts(job) == 2 and "2 nodes (node[1-2]) x 1 ranks, master node1:" in output, output
    assert "stopped on request; requeued" in output and "start 2: 2 nodes" in output and f"{job}: done" in output
    logs = [Path(start, "rank-0000.txt").read_text() for start in re.findall(r"a log a rank in (\S+)", output)]
    assert [re.findall(r"^resumed from step (\d+) ", log, re.MULTILINE) for log in logs] == [[], ["7"], ["14"]], logs
    assert (folder / "events.jsonl").read_text().count("\n") >= 3
    assert differences(result(folder), result(whole)) == []


def test_a_foreign_folder_is_refused_and_not_requeued(cluster, site, run_inputs, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    job = cluster.submit(TRAIN, arguments(run_inputs, tmp_path), NODES, site)
    assert cluster.wait(job, timeout_s=PATIENCE_S) == "FAILED", cluster.output(job)
    assert f"failed (code {USER_ERROR}), not requeued: error: run.dir: " in cluster.output(job)
    assert cluster.restarts(job) == 0 and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
