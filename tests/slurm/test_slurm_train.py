"""launcher/slurm/train.sbatch on a real SLURM of two nodes: to the end, stopped, requeued, refused, bounded.

The quickstart with its real teacher, text and compensated resizes under ZeRO-2, in fp32 and fewer steps.
"""

import subprocess
import sys
import time

import pytest
from slurm_cluster import ROOT
from support.small_job import arguments, differences, result

from homodistil.distributed.exit_codes import USER_ERROR

TRAIN = ROOT / "launcher" / "slurm" / "train.sbatch"
NODES = ["--nodes=2", "--time=10"]
PATIENCE_S = 240  # other lanes use the processor as well
STEPS = 22  # the second requeue is behind step 15, a checkpoint: fewer than eight steps are left then
FROZEN = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=8:action=stop"}
"""Rank 1 stands still in the eighth step of every start, so that a signal meets it there. It goes on by SIGCONT."""


QUICKSTART = [
    "recipe=quickstart",
    f"train.steps={STEPS}",
    "pruning.end_fraction=0.9",
    "pruning.interval_steps=2",
    "teacher.correction_steps=0",
    "run.compare=[]",
    "run.report=false",
    "train.log_every_steps=1",
    "train.save_every_steps=3",
    "train.eval_batch_size=256",
    "data.heldout_fraction=0.002",
]


@pytest.fixture(scope="module")
def quickstart(cache_dir):
    """Arguments but for run.dir. What has to be fetched is fetched now, as on a login node: nodes have no network."""
    fields = [*QUICKSTART, f"data.cache_dir={cache_dir}"]
    subprocess.run([sys.executable, ROOT / "launcher" / "prepare_data.py", *fields], check=True, cwd=ROOT)
    return ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp32.json"), *fields]


def _wait_for_step(cluster, job, folder, step):
    path, deadline = folder / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.05)
    time.sleep(0.5)  # from the line of the step before to the fault


@pytest.fixture(scope="module")
def runs(cluster, site, quickstart, tmp_path_factory):
    """(folder, job) of an uninterrupted run, and of one that is stopped twice in the middle of pruning.

    The first waits until the second, requeued, has left the nodes: no time is lost.
    """
    folder = tmp_path_factory.mktemp("runs")
    stopped = cluster.submit(TRAIN, [*quickstart, f"run.dir={folder / 'stopped'}"], NODES, site | FROZEN)
    whole = cluster.submit(TRAIN, [*quickstart, f"run.dir={folder / 'whole'}"], NODES, site)
    _wait_for_step(cluster, stopped, folder / "stopped", 7)
    cluster.run("scancel", "--signal=USR1", stopped)
    cluster.run("scancel", "--signal=CONT", stopped)
    _wait_for_step(cluster, stopped, folder / "stopped", 16)
    cluster.run("scontrol", "requeue", stopped)
    return (folder / "whole", whole), (folder / "stopped", stopped)


def test_two_nodes_distil_with_resizes(runs, cluster):
    folder, job = runs[0]
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", cluster.output(job)
    assert "2 nodes (node[1-2]) x 1 ranks, master node1:" in cluster.output(job)
    assert cluster.restarts(job) == 0
    assert (folder / "events.jsonl").read_text().count("\n") >= 7
    assert (folder / "export" / "model.safetensors").is_file()


def test_stopped_and_requeued_it_goes_on_bitwise(runs, cluster):
    (whole, first), (stopped, job) = runs
    assert cluster.wait(job, timeout_s=180) == "COMPLETED", cluster.output(job)
    cluster.wait(first, timeout_s=120)
    output = cluster.output(job)
    assert cluster.restarts(job) == 2, output
    assert "stopped on request; requeued" in output and "start 2: 2 nodes" in output and f"{job}: done" in output
    assert (whole / "export" / "model.safetensors").read_bytes() == (
        stopped / "export" / "model.safetensors"
    ).read_bytes()
    assert differences(result(stopped), result(whole)) == []


def test_a_foreign_folder_is_refused_and_not_requeued(cluster, site, slurm_materials, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    job = cluster.submit(TRAIN, arguments(slurm_materials, tmp_path), NODES, site)
    assert cluster.wait(job, timeout_s=120) == "FAILED", cluster.output(job)
    assert f"failed (code {USER_ERROR}), not requeued: error: run.dir: " in cluster.output(job)
    assert cluster.restarts(job) == 0 and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
