"""What nobody foresaw: one line on one rank, a file that it names with the traceback, one exit code on all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.small_job import TRAIN, arguments

from homodistil.distributed.exit_codes import FAILED


@pytest.mark.parametrize("rank", [0, 1, None])
def test_an_unforeseen_error_in_the_start_phase(server, run_inputs, tmp_path, rank):
    where = "" if rank is None else f":rank={rank}"
    env = {"HOMODISTIL_FAULT": f"start.materials{where}:action=raise"}
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run"), env=env)
    assert job.wait(timeout_s=60) == [FAILED, FAILED], job.output()
    assert "Traceback" not in job.output()
    lines = [line for line in job.output().splitlines() if "error: " in line]
    assert len(lines) == 1, job.output()
    assert "failed while preparing teacher and data: RuntimeError: injected at start.materials" in lines[0]
    (path,) = re.findall(r"the traceback is in (\S+\.txt) on ", lines[0])
    content = Path(path).read_text()
    Path(path).unlink()
    assert "Traceback" in content and "homodistil/train.py" in content and "launcher/train.py" in content
    assert not (tmp_path / "run").exists()


def test_an_unforeseen_error_in_training_is_one_line_of_the_rank_that_failed(server, run_inputs, tmp_path):
    """The survivor's line and code are a lost rank's: there may be a checkpoint to go on from (test_watch.py)."""
    env = {"HOMODISTIL_FAULT": "train.step:rank=1:hit=3:action=raise"}
    job = server.start(TRAIN, arguments(run_inputs, tmp_path / "run"), env=env)
    assert job.wait(timeout_s=60)[1] == FAILED
    (line,) = [line for line in job.output(1).splitlines() if "error: " in line and "Error: injected" in line]
    assert "error: rank 1: failed while training: RuntimeError: injected at train.step" in line, job.output(1)
    assert line.endswith("; the traceback is above") and "Traceback" in job.output(1)
