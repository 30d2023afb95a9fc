"""Tests of the kernels on a CPU: `@pytest.mark.interpreted` marks what needs Triton's interpreter.

Triton reads TRITON_INTERPRET once, when it is imported, so one process knows one mode; and the libraries that the rest
of the suite imports bring triton with them. Marked tests therefore run in a child pytest with the variable set: one
child a file, started by its first marked test; each test still passes or fails under its own name. Unmarked tests
(plain torch, kernels compiled ahead) run in this process, without the variable. To step through a kernel:

    TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/test_attention_map.py

Kernels are slow there (about 5 ms for each step of a kernel's inner loop, whatever the tile): few programs, big tiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from homodistil.kernels.triton_support import interpreted, triton_installed

OUTCOMES_FILE = "HOMODISTIL_INTERPRETED_OUTCOMES"
"""Environment of the child: the file that takes one JSON line a test."""

_outcomes = pytest.StashKey[dict[Path, dict[str, dict]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: needs Triton's interpreter (tests/unit/kernels/conftest.py)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is interpreted runs in a child process."""
    for item in items:
        if item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.process)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("interpreted") and not triton_installed():
        pytest.skip("triton is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if interpreted() or not pyfuncitem.get_closest_marker("interpreted"):
        return None
    of_files = pyfuncitem.session.stash.setdefault(_outcomes, {})
    if pyfuncitem.path not in of_files:
        of_files[pyfuncitem.path] = _run_file(pyfuncitem)
    outcome = of_files[pyfuncitem.path].get(pyfuncitem.nodeid)
    if outcome is None:
        pytest.fail("the child process ended before this test; see the first failure of the file", pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def _run_file(item: pytest.Function) -> dict[str, dict]:
    """Run the selected marked tests of the item's file in a child; returns {node id: {outcome, text}}."""
    selected = [
        other.nodeid
        for other in item.session.items
        if other.path == item.path and other.get_closest_marker("interpreted")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", *selected]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "outcomes.jsonl")
        environment = os.environ | {"TRITON_INTERPRET": "1", OUTCOMES_FILE: str(lines)}
        child = subprocess.run(command, cwd=item.config.rootpath, env=environment, capture_output=True, text=True)
        if not lines.exists():
            pytest.fail(f"no test ran in the child process:\n{child.stdout}\n{child.stderr}", pytrace=False)
        return {line["test"]: line for line in map(json.loads, lines.read_text().splitlines())}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: one line for what ended a test (its call, or a set-up that failed or skipped)."""
    path = os.environ.get(OUTCOMES_FILE)
    if path and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(path, "a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "text": text}) + "\n")
