"""DeepSpeed's compiled ops: found where setup has built it, and never built in silence."""

import os
import shutil
import signal
import time
from pathlib import Path

from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.engine.native_ops import OF_SETUP


def test_what_setup_has_built_is_found_without_an_activated_environment(server, tmp_path):
    job = server.start("op_jobs:load", [], num_ranks=1)  # which waits for who builds it, or builds it
    assert job.wait(timeout_s=200) == [0], job.output()
    built = tmp_path / "built"  # a copy, so that nothing happens to the one that all tests use
    shutil.copytree(Path(os.environ.get("TORCH_EXTENSIONS_DIR", OF_SETUP)) / "cpu_adam", built / "cpu_adam")
    job = server.start("op_jobs:load_without_environment", [str(built)], num_ranks=1)
    assert job.wait(timeout_s=60) == [0], job.output()
    assert "building" not in job.output() and "loaded" in job.output()


def test_building_is_said_before_it_is_done(server, tmp_path):
    job = server.start("op_jobs:load", [], num_ranks=1, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    while "building DeepSpeed's op cpu_adam: about a minute, once" not in job.output():
        assert job.is_running(), job.output()
        time.sleep(0.02)
    os.killpg(job.pids[0], signal.SIGKILL)
    job.wait(timeout_s=20)


def test_without_ninja_a_line_says_so(server, tmp_path):
    job = server.start("op_jobs:load_without_ninja", [str(tmp_path)], num_ranks=1)
    assert job.wait(timeout_s=60) == [USER_ERROR], job.output()
    assert job.output().count("error: ninja: found neither on PATH nor in") == 1 and "Traceback" not in job.output()
