"""A prepared corpus that is cut short or deleted, while a job reads it and before one goes on."""

import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from small_job import TRAIN, arguments, differences, result

from homodistil.data.corpus import Rows
from homodistil.errors import UserError
from homodistil.exit_codes import USER_ERROR


def _blocks(cache):
    (path,) = (cache / "corpora").glob("*/train.npy")
    return path


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_that_is_cut_short_while_it_is_read(server, materials, reference, tmp_path, workers):
    """Both ranks stand still (SIGSTOP) in a step while half the file goes; on resume it is prepared again."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(materials / "cache", cache)
    own = arguments(materials, folder, "run.resume=auto", f"data.cache_dir={cache}", f"data.workers={workers}")
    job = server.start(TRAIN, own, env={"HOMODISTIL_FAULT": "train.step:hit=6:action=stop"})
    while not all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in job.pids):
        assert job.is_running(), job.output()
        time.sleep(0.02)
    _truncate(_blocks(cache))
    job.kill(None, signal.SIGCONT)
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert f"{_blocks(cache)}: was cut short while it was being read; run again with run.resume=auto" in line
    assert "Traceback" not in job.output()
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert f"warning: {_blocks(cache).parent} is damaged (" in job.output(0) + job.output(1)
    assert differences(result(folder), result(reference)) == []


@pytest.mark.parametrize("damage", ["train.npy", "heldout.npy", "corpus.json", "empty"])
def test_a_damaged_corpus_is_prepared_again(server, materials, tmp_path, damage):
    cache = tmp_path / "cache"
    shutil.copytree(materials / "cache", cache)
    path = _blocks(cache)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    if damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_name(damage).unlink()
    job = server.start("fault_jobs:prepare", [str(materials), str(cache)], num_ranks=2)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert job.output().count("is damaged") == 1
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_deleted_file_is_read_on_while_it_is_open(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(200, dtype=np.uint16).reshape(20, 10))
    rows = Rows(tmp_path / "train.npy")
    (tmp_path / "train.npy").unlink()
    assert rows[[19]].tolist() == [list(range(190, 200))]


def test_a_file_that_is_cut_short_is_not_touched(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros((1000, 100), dtype=np.uint16))
    rows = Rows(tmp_path / "train.npy")
    _truncate(tmp_path / "train.npy")
    with pytest.raises(UserError, match="train.npy: was cut short while it was being read"):
        rows[[999]]
