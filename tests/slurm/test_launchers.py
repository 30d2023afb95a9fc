"""Every launcher of docs/launchers.md, run for real on this machine: the export of each is bitwise the same.

Two nodes are two launchers, each with one rank, as on two machines; only `deepspeed --num_accelerators 2` has both.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launch import ROOT
from support.small_job import TRAIN, arguments

from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.distributed.free_port import free_port

PROGRAMS = Path(sys.executable).parent
LIMIT_S = 480


def _environment() -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | own | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"}


def _run(*commands: list[str]) -> None:
    """All commands at once, until all have ended well."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(list(map(str, command)), env=_environment(), **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    finally:
        for process in started:
            process.terminate()
            process.wait(30)
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)[-4000:]


def _export(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


@pytest.fixture
def job(run_inputs, tmp_path):
    """(script with its arguments, function that reads its export)"""
    return [TRAIN, *arguments(run_inputs, tmp_path / "run")], lambda: _export(tmp_path / "run")


def test_deepspeed_on_one_node(job, reference):
    command, export = job
    _run(["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), *command])
    assert export() == _export(reference)


def test_deepspeed_with_a_hostfile_of_two_nodes_without_ssh(job, reference, tmp_path):
    command, export = job
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    shared = [
        "--hostfile",
        tmp_path / "hostfile",
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
    ]
    _run(*(["deepspeed", *shared, "--node_rank", node, *command] for node in (0, 1)))
    assert export() == _export(reference)


def test_torchrun_with_two_nodes(job, reference):
    command, export = job
    shared = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    _run(*([*shared, f"--node_rank={node}", *command] for node in (0, 1)))
    assert export() == _export(reference)


@pytest.mark.full
def test_torchrun_with_a_rendezvous(job, reference):
    command, export = job
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=7"]
    _run(*(["torchrun", "--nnodes=2", "--nproc_per_node=1", *rendezvous, *command] for _ in range(2)))
    assert export() == _export(reference)


needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")
AS_ROOT = "--allow-run-as-root --oversubscribe"  # only for this machine: root, and perhaps fewer cores than ranks


@needs_mpirun
@pytest.mark.full
def test_mpirun(job, reference):
    command, export = job
    _run(["mpirun", *AS_ROOT.split(), "-n", 2, sys.executable, "-u", *command])
    assert export() == _export(reference)


@needs_mpirun
@pytest.mark.full
def test_deepspeed_by_openmpi(job, reference, tmp_path):
    command, export = job
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    options = ["--hostfile", tmp_path / "hostfile", "--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    _run(["deepspeed", *options, "--launcher", "openmpi", "--launcher_args", AS_ROOT, *command])
    assert export() == _export(reference)


@pytest.mark.full
def test_deepspeed_by_slurm(cluster, site, run_inputs, reference, tmp_path):
    """Its srun hands on neither RANK nor MASTER_*: both come from SLURM's variables."""
    script = Path(__file__).with_name("deepspeed_launcher.sbatch")
    own = [str(tmp_path / "hostfile"), *arguments(run_inputs, tmp_path / "run")]
    job = cluster.submit(script, own, ["--nodes=2", "--ntasks-per-node=1", "--time=10"], site)
    assert cluster.wait(job, timeout_s=LIMIT_S) == "COMPLETED", cluster.output(job)
    assert _export(tmp_path / "run") == _export(reference)


@pytest.mark.full
def test_the_exit_code_of_a_user_error_comes_back_from_torchrun(run_inputs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = ["torchrun", "--nnodes=1", "--nproc_per_node=2", f"--master_port={free_port()}", TRAIN]
    done = subprocess.run(
        list(map(str, [*command, *arguments(run_inputs, tmp_path)])),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1 and f"exitcode  : {USER_ERROR}" in done.stderr, done.stderr[-2000:]
