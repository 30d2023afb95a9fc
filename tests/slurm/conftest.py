"""One cluster for all SLURM tests, the small job's teacher and text, and a site file as a user would write one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def slurm_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="session")
def cluster(slurm_folder):
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(slurm_folder) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_materials(tmp_path_factory):
    """Folder with the small teacher, its text and the cache, as tests/faults has it."""
    from support.small_job import make_materials

    folder = tmp_path_factory.mktemp("slurm-materials")
    make_materials(folder)
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Environment of sbatch: the cluster's settings."""
    folder = tmp_path_factory.mktemp("site")
    lines = [
        f"PATH={Path(sys.executable).parent}:$PATH",
        f"LOG_DIR=${{LOG_DIR:-{folder}/logs}}",
        "export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo",
        "MAX_LOSS_REQUEUES=1",
        "RANK_EXIT_WAIT_S=60",
    ]
    (folder / "site.env").write_text("\n".join(lines) + "\n")
    # As on a login node: what the tests themselves run in (their virtual environment aside) is not the job's.
    return {"HOMODISTIL_SITE": str(folder / "site.env"), "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", sys.prefix)}
