"""Full disks and folders that cannot be written: one line that names the file, exit code 2, and nothing is lost."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from support.fork_server import ROOT
from support.small import small_model
from support.small_job import TRAIN, VOCABULARY, arguments, differences, result
from transformers import BertTokenizerFast

from homodistil.distributed.exit_codes import USER_ERROR
from homodistil.errors import UserError
from homodistil.export.stock_model import save_checkpoint
from homodistil.metrics.recorder import Recorder, read_lines
from homodistil.metrics.result_table import write_result
from homodistil.report import write_report

FULL = "No space left on device"


class Disk:
    """A real file system of a few megabytes."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self) -> None:
        with open(self.folder / "ballast", "ab", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass

    def make_room(self) -> None:
        (self.folder / "ballast").unlink()

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _errors(job) -> list[str]:
    assert "Traceback" not in job.output(), job.output()
    return [line for line in job.output().splitlines() if line.startswith("error")]


def test_a_disk_that_fills_up_while_training(server, run_inputs, reference, tmp_path, disk):
    """Whatever is written next fails; with room again the run ends as if nothing had happened."""
    folder = disk.folder / "run"
    own = arguments(run_inputs, folder, "run.resume=auto")
    job = server.start(TRAIN, own)
    while job.is_running() and not (folder / "checkpoints" / "step-000003").is_dir():
        time.sleep(0.01)
    disk.fill()
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = _errors(job)
    assert FULL in line and str(folder) in line and "free disk space" in line and "run.resume=auto" in line
    disk.make_room()
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert differences(result(folder), result(reference)) == []


def test_a_checkpoint_that_does_not_fit(server, run_inputs, reference, tmp_path):
    """Every rank may write files of at most 40 kB: logs fit, what a rank writes of a checkpoint does not."""
    folder = tmp_path / "run"
    job = server.start("fault_jobs:train_with_file_limit", [40_000, arguments(run_inputs, folder)])
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = _errors(job)
    assert "checkpoint: rank 0 cannot write" in line and "File too large" in line and "free disk space" in line
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-")]
    job = server.start(TRAIN, arguments(run_inputs, folder, "run.resume=auto"))
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert differences(result(folder), result(reference)) == []


def test_a_read_only_place_for_the_run_folder(server, run_inputs, disk):
    disk.make_read_only()
    job = server.start(TRAIN, arguments(run_inputs, disk.folder / "run"))
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = _errors(job)
    assert "run.dir: cannot write to" in line and "Read-only file system" in line and not list(disk.folder.iterdir())


def test_a_read_only_run_folder_of_a_run_to_go_on_with(server, run_inputs, reference, disk):
    folder = disk.folder / "run"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("export", "*.html", "tensorboard"))
    (folder / "row.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk.make_read_only()
    job = server.start(TRAIN, arguments(run_inputs, folder, "run.resume=auto"))
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = _errors(job)
    assert "run.dir: cannot write to" in line and "Read-only file system" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# -- every writer on its own, on a full disk


def test_metrics_and_events(disk):
    recorder = Recorder(disk.folder, 10, 0, enabled=True)
    recorder.log_step(1, {"loss/total": 1.0})
    disk.fill()
    with pytest.raises(UserError, match=rf"^{disk.folder}/metrics.jsonl: cannot be written \({FULL}\); free disk "):
        for step in range(2, 2000):  # the last block of the file has room for some lines
            recorder.log_step(step, {"loss/total": 1.0})
    with pytest.raises(UserError, match=r"events.jsonl: cannot be written"):
        for step in range(2, 2000):
            recorder.log_event({"step": step, "hash": "0" * 64})
    recorder.close()
    disk.make_room()
    assert read_lines(disk.folder / "metrics.jsonl")[0]["loss/total"] == 1.0
    with Recorder(disk.folder, 10, 1, enabled=True) as again:  # the torn last line is dropped
        again.log_step(2, {"loss/total": 2.0})
    lines = [json.loads(line) for line in (disk.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_tensorboard(disk):
    recorder = Recorder(disk.folder, 10, 0, enabled=True)
    disk.fill()
    with pytest.raises(UserError, match=rf"{FULL}"):
        for step in range(1, 2000):
            recorder._track({"loss/total": 1.0}, step)
            time.sleep(0.001)  # its files are written by a thread
    recorder.close()


def test_export(disk, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    folder = disk.folder / "export"
    save_checkpoint(small_model(seed=1), tokenizer, "first", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    disk.fill()
    with pytest.raises(UserError, match=rf"^{folder}: cannot be written \(.*{FULL}.*\); free disk space"):
        save_checkpoint(small_model(seed=2), tokenizer, "second", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not folder.with_name(".export.part").exists()


@pytest.mark.parametrize("writer", [lambda folder: write_result(folder, [{"name": "x" * 9000}]), write_report])
def test_result_and_report(disk, reference, writer):
    folder = disk.folder / "run"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("checkpoints", "export", "tensorboard"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    disk.fill()
    with pytest.raises(UserError, match=rf"(result.json|report.html): cannot be written \({FULL}\)"):
        writer(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_corpus_cache(server, run_inputs, tmp_path, disk):
    disk.fill()
    own = arguments(run_inputs, tmp_path / "run", f"data.cache_dir={disk.folder / 'cache'}")
    job = server.start(TRAIN, own)
    assert job.wait(timeout_s=180) == [USER_ERROR] * 2, job.output()
    (line,) = _errors(job)
    assert "data.cache_dir: cannot write" in line and FULL in line and not (tmp_path / "run").exists()


def test_the_disk_fixture_is_what_it_says(disk):
    disk.fill()
    with pytest.raises(OSError, match=FULL):
        (disk.folder / "one").write_bytes(bytes(8192))
    disk.make_room()
    torch.save(torch.zeros(1000), disk.folder / "one")
    assert ROOT.is_dir()
