"""srun's and mpirun's variables become torch's; a launcher's own win; what is missing is named."""

import pytest

from homodistil.distributed import launcher_env
from homodistil.distributed.launcher_env import adopt_launcher_variables, rank_before_joining
from homodistil.errors import UserError

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def _adopted(monkeypatch, found: dict[str, str]) -> dict[str, str]:
    found = dict(found)
    monkeypatch.setattr(launcher_env.os, "environ", found)  # what is set must not reach other tests
    adopt_launcher_variables()
    return found


def test_slurm(monkeypatch):
    found = _adopted(monkeypatch, SLURM | {"MASTER_ADDR": "node1"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "8", "1")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "23456")


def test_openmpi(monkeypatch):
    found = _adopted(monkeypatch, OPENMPI | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["5", "8", "1", "4"]
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "29500")


def test_openmpi_on_one_machine_needs_no_address_and_on_several_asks_for_it(monkeypatch):
    found = _adopted(monkeypatch, OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_MCA_ess_base_jobid": "3141592"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "21592")
    with pytest.raises(UserError, match="^MASTER_ADDR: not set, and mpirun's 8 ranks are on several machines"):
        _adopted(monkeypatch, OPENMPI)


def test_the_variables_of_a_launcher_inside_the_job_win(monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert _adopted(monkeypatch, SLURM | OPENMPI | launcher) == SLURM | OPENMPI | launcher
    assert rank_before_joining() == 0


def test_a_single_rank_is_left_alone(monkeypatch):
    assert "RANK" not in _adopted(monkeypatch, SLURM | {"SLURM_NTASKS": "1"})
    assert "RANK" not in _adopted(monkeypatch, {})
    assert rank_before_joining() == 0


def test_no_scontrol_within_a_container_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="^MASTER_ADDR: not set, and `scontrol show hostnames node"):
        _adopted(monkeypatch, SLURM | {"SLURM_JOB_NODELIST": "node[1-2]", "PATH": ""})
