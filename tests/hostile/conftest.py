"""Jobs of hostile inputs that are started ahead of their turn."""

from __future__ import annotations

import pytest
from attempts import Attempts
from support.small_job import make_materials


@pytest.fixture(scope="session")
def attempts(request, server, tmp_path_factory) -> Attempts:
    """Starts the selected cases, some ahead of the one that is asked for."""
    run_inputs = tmp_path_factory.mktemp("hostile-materials")
    make_materials(run_inputs)
    selected = [item.callspec.params["case"] for item in request.session.items if "attempts" in item.fixturenames]
    return Attempts(server, run_inputs, tmp_path_factory.mktemp("hostile"), selected)
