"""Fixtures of tests that start jobs: one fork server per test run, and one small teacher with its text.

What is imported inside of them takes seconds, and most unit tests need none of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fork_server import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Of all lanes of the test run."""
    with ForkServer(os.environ.get("PYTEST_XDIST_TESTRUNUID")) as server:
        yield server


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory) -> Path:
    """Folder with the teacher, its text and the cache."""
    from support.small_job import make_materials

    folder = tmp_path_factory.mktemp("materials")
    make_materials(folder)
    return folder


@pytest.fixture(scope="session")
def reference(server, run_inputs, tmp_path_factory) -> Path:
    """Run folder of the job that nothing happened to."""
    from support.small_job import TRAIN, arguments

    folder = tmp_path_factory.mktemp("reference") / "run"
    job = server.start(TRAIN, arguments(run_inputs, folder))
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    return folder
