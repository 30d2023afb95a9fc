"""Fixtures of tests that start the small job: one fork server, and one small teacher with its text."""

from __future__ import annotations

import pytest

from support.fork_server import ForkServer
from support.small_job import TRAIN, arguments, make_materials


@pytest.fixture(scope="session")
def server():
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory):
    """Folder with the teacher, its text and the cache."""
    folder = tmp_path_factory.mktemp("materials")
    make_materials(folder)
    return folder


@pytest.fixture(scope="session")
def reference(server, run_inputs, tmp_path_factory):
    """Run folder of the job that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    job = server.start(TRAIN, arguments(run_inputs, folder))
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    return folder
