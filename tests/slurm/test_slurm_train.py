"""launcher/slurm/train.sbatch on a real SLURM of two nodes: stopped, requeued, to the end; bitwise as without SLURM.

The small job with compensated resizes under ZeRO-2, in fp32. `make test-full` also has the quickstart, its real teacher
and text, in fewer and smaller steps.
"""

import json
import time
from functools import partial

import pytest
from slurm_cluster import ROOT
from support.small_job import STEPS, TRAIN, arguments, differences, result

from homodistil.distributed.exit_codes import USER_ERROR

SCRIPT = ROOT / "launcher" / "slurm" / "train.sbatch"
NODES = ["--nodes=2", "--time=10"]
PATIENCE_S = 240  # other lanes use the processor as well
FROZEN = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=5:action=stop"}
"""Rank 1 stands still in the fifth step of every start, so that a signal meets it there. It goes on by SIGCONT.

Fewer than five of the 10 steps are left for the second start.
"""


QUICKSTART = [
    "recipe=quickstart",
    "data.sources=embedded:bible",
    "data.seq_len=16",
    "data.heldout_fraction=0.002",
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "train.save_every_steps=3",
    "train.eval_batch_size=256",
    "pruning.end_fraction=0.9",
    "pruning.interval_steps=2",
    "pruning.compensation_sequences=32",
    "teacher.correction_steps=0",
    "run.compare=[]",
    "run.report=false",
]


def _quickstart(folder, cache_dir):
    engine = ROOT / "ds_configs" / "zero2_fp32.json"
    return ["--deepspeed", str(engine), *QUICKSTART, f"data.cache_dir={cache_dir}", f"run.dir={folder}"]


@pytest.fixture(scope="module", params=["small", pytest.param("quickstart", marks=pytest.mark.full)])
def arguments_in(request, slurm_materials, cache_dir):
    """Folder of a run -> command line of the job in it."""
    if request.param == "quickstart":
        return partial(_quickstart, cache_dir=cache_dir)
    return lambda folder: arguments(slurm_materials, folder, "pruning.compensation=full")


def _frozen_job(cluster, site, command):
    """A job whose rank 1 stands still: in the middle of pruning, and behind the last checkpoint."""
    job = cluster.submit(SCRIPT, command, NODES, site | FROZEN)
    deadline = time.monotonic() + PATIENCE_S
    while not cluster.has_stopped_process():
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    return job


@pytest.fixture(scope="module")
def whole(server, arguments_in, tmp_path_factory):
    """Folder of a run of two ranks without SLURM and without an interruption.

    It also fetches and prepares everything, as one would on a login node: nodes of the cluster have no network.
    """
    folder = tmp_path_factory.mktemp("whole") / "run"
    server.run(TRAIN, arguments_in(folder), num_ranks=2, timeout_s=300)
    return folder


@pytest.fixture(scope="module")
def stopped(cluster, site, whole, arguments_in, tmp_path_factory):
    """(folder, job) of a job that a signal has stopped; it has been requeued, and has ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    job = _frozen_job(cluster, site, arguments_in(folder))
    cluster.run("scancel", "--signal=USR1", job)
    cluster.run("scancel", "--signal=CONT", job)
    assert cluster.wait(job, timeout_s=PATIENCE_S) == "COMPLETED", cluster.output(job)
    return folder, job


def test_two_nodes_distil_with_resizes(stopped, cluster):
    folder, job = stopped
    assert "start 0: 2 nodes (node[1-2]) x 1 ranks, master node1:" in cluster.output(job)
    steps = [json.loads(line)["step"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert len(steps) >= 4 and steps[0] < 5 and steps[-1] > 6  # it stops behind step 6
    assert (folder / "export" / "model.safetensors").is_file()


def test_stopped_and_requeued_it_equals_a_run_without_slurm(stopped, whole, cluster):
    folder, job = stopped
    output = cluster.output(job)
    assert cluster.restarts(job) == 1, output
    assert "stopped on request; requeued" in output and "start 1: 2 nodes" in output and f"{job}: done" in output
    _are_the_same(folder, whole)


def _are_the_same(folder, whole):
    export = "export/model.safetensors"
    assert (whole / export).read_bytes() == (folder / export).read_bytes()
    assert differences(result(folder), result(whole)) == []


@pytest.mark.full
def test_requeued_by_slurm_it_equals_a_run_without_slurm(cluster, site, whole, arguments_in, tmp_path):
    """What SLURM sends is CONT and TERM. In `make test`: test_slurm_policy.py, and TERM to ranks in test_stop.py."""
    job = _frozen_job(cluster, site, arguments_in(tmp_path / "run"))
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, timeout_s=PATIENCE_S) == "COMPLETED", cluster.output(job)
    assert cluster.restarts(job) == 1, cluster.output(job)
    _are_the_same(tmp_path / "run", whole)


def test_a_foreign_folder_is_refused_and_not_requeued(cluster, site, slurm_materials, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    job = cluster.submit(SCRIPT, arguments(slurm_materials, tmp_path), NODES, site)
    assert cluster.wait(job, timeout_s=120) == "FAILED", cluster.output(job)
    assert f"failed (code {USER_ERROR}), not requeued: error: run.dir: " in cluster.output(job)
    assert cluster.restarts(job) == 0 and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
