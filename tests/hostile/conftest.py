"""One fork server for all hostile inputs, and jobs that are started ahead of their turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "hostile"), str(TESTS / "distributed"), str(TESTS / "faults")]

from attempts import Attempts  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from small_job import make_materials  # noqa: E402


@pytest.fixture(scope="session")
def attempts(request, tmp_path_factory) -> Iterator[Attempts]:
    """Starts the selected cases, some ahead of the one that is asked for."""
    run_inputs = tmp_path_factory.mktemp("hostile-materials")
    make_materials(run_inputs)
    selected = [item.callspec.params["case"] for item in request.session.items if "attempts" in item.fixturenames]
    with ForkServer() as server:
        yield Attempts(server, run_inputs, tmp_path_factory.mktemp("hostile"), selected)
