"""A job that reads its teacher's vectors from files: bitwise the run with the teacher in it, however often it was
killed, with any number of ranks and workers, and with damaged files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from support.fork_server import ROOT
from support.small_job import TRAIN, arguments, differences, make_materials, result

from homodistil.distributed.exit_codes import USER_ERROR

TEXTS_OF_A_SHARD = 32
STORED = "teacher.outputs=stored"
LOSSES = {"pooled_cosine": 10, "pooled_mse": 1, "pooled_similarity": 1, "hidden": 0, "attention": 0, "embedding": 0}
FIELDS = (
    *("data.task=embedding", f"data.shard_bytes={TEXTS_OF_A_SHARD * 4 * 16}"),
    *("pruning.compensation=full", "pruning.compensation_sequences=16"),
    *(f"loss.{name}={weight}" for name, weight in LOSSES.items()),
)


def command(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    given = [field for field in arguments(inputs, run_dir, *FIELDS, *overrides) if not field.startswith("loss.kl=")]
    return [field for field in given if field != "pruning.compensation=none"]


def run(server, arguments: list[str], codes=(0, 0), env=None, num_ranks: int = 2) -> str:
    job = server.start(TRAIN, arguments, env=env, num_ranks=num_ranks)
    assert sorted(job.wait(timeout_s=180)) == sorted(codes), job.output()
    assert "Traceback" not in job.output(), job.output()
    return job.output()


def compared(run_dir: Path) -> dict:
    """`result`, without what a teacher that does not run cannot show: attention, at a weight of 0."""

    def known(line):
        if not isinstance(line, dict):
            return line
        return {name: known(value) for name, value in line.items() if not re.match("(gap/)?attention", name)}

    return {name: [*map(known, value)] if isinstance(value, list) else value for name, value in result(run_dir).items()}


def folder_of(inputs: Path) -> Path:
    (path,) = (inputs / "cache" / "teacher_outputs").glob("[!.]*")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    make_materials(folder)
    return folder


@pytest.fixture(scope="module")
def live(server, inputs) -> Path:
    """Run folder of the job with its teacher in it."""
    run(server, command(inputs, inputs / "live"))
    return inputs / "live"


@pytest.fixture(scope="module")
def stored(server, inputs, live) -> Path:
    """Run folder of the same job with the teacher's vectors in files."""
    output = run(server, command(inputs, inputs / "stored", STORED))
    assert "note: " not in output, output
    return inputs / "stored"


def test_it_is_bitwise_the_run_with_the_teacher_in_it(live, stored, inputs):
    assert differences(compared(stored), compared(live)) == []
    lines = [json.loads(line) for line in (stored / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["gap/pooled_cosine"] > 0 and not any("gap/attention" in line for line in lines)
    assert not list((inputs / "cache" / "parts").glob("[!.]*"))


def test_killed_in_three_places_it_ends_bitwise_the_same(server, inputs, stored, live, tmp_path):
    """Twice while the vectors are computed, and once behind the second checkpoint."""
    folder = tmp_path / "it"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("live", "stored", "cache"))
    arguments = command(folder, folder / "run", STORED, "run.resume=auto")
    finished = set()
    for _ in range(2):  # shards go to whichever rank is free: a rank is killed at the end of its second one
        job = server.start(TRAIN, arguments, env={"HOMODISTIL_FAULT": "outputs.shard_written:hit=2"})
        assert -9 in job.wait(timeout_s=180), job.output()
        shards = {*(folder / "cache" / "parts").glob("outputs-*/[!.]*/rows.npy")}
        assert shards > finished and not list((folder / "cache" / "teacher_outputs").glob("[!.]*"))
        finished = shards
    run(server, arguments, (-9, -9), {"HOMODISTIL_FAULT": "train.step:hit=8"})
    assert contents(folder_of(folder)) == contents(folder_of(inputs))
    assert "resumed from step 6" in run(server, arguments)
    assert differences(compared(folder / "run"), compared(live)) == []


def test_several_students_of_one_job_read_them(server, inputs, live, stored, tmp_path):
    files = [tmp_path / f"{name}.yaml" for name in ("half", "wide")]
    for file, width in zip(files, (12, 16), strict=True):
        file.write_text(f"student: {{hidden_size: {width}, intermediate_size: 20}}\n")
    run(server, [*command(inputs, tmp_path / "run", STORED), "--teachers-once", ",".join(map(str, files))])
    ours, theirs = compared(tmp_path / "run" / "students" / "half"), compared(live)
    del ours["result.json"], theirs["result.json"]  # the names of rows
    assert [name for name in differences(ours, theirs) if "'cpu'" not in name] == []  # one random state for both


def test_a_check_before_the_run_takes_a_step_without_files(server, inputs, stored, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (inputs / "cache").rglob("*")}
    output = run(server, [*command(inputs, tmp_path / "run", STORED, "loss.similarity_temperature=0.3"), "--check"])
    assert "forward, backward, step, cut to hidden" in output and "this run can start" in output
    assert {path: path.stat().st_mtime_ns for path in (inputs / "cache" / "teacher_outputs").rglob("*")}.items() <= (
        before.items()
    )


def test_resume_may_change_where_the_outputs_come_from(server, inputs, stored, live, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stored, folder)
    for name in ("checkpoints/step-000010", "export"):
        shutil.rmtree(folder / name)
    (folder / "row.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step-000009\n")
    output = run(server, command(inputs, folder, "run.resume=auto"))
    assert "resumed from step 9" in output
    assert differences(compared(folder), compared(live)) == []


def test_several_workers_compute_them_ahead_of_the_run(server, inputs, stored, tmp_path):
    folder = tmp_path / "it"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("live", "stored", "cache"))
    given = command(folder, folder / "run", STORED, "teacher.dtype=float32")
    given = given[:2] + given[4:]  # without --deepspeed
    worker(server, [*given, "teacher.outputs=live"])  # the text alone: a part of the work below
    said = [worker(server, [*given, "--task", str(task), "--tasks", "2"]) for task in (0, 1)]
    assert "shards of the teacher's outputs are left to other tasks" in said[0]
    assert f"teacher's outputs: {folder_of(folder)}" in said[1]
    assert contents(folder_of(folder)) == contents(folder_of(inputs))


def worker(server, arguments: list[str]) -> str:
    job = server.start(ROOT / "launcher" / "prepare_data.py", arguments, num_ranks=1)
    assert job.wait(timeout_s=180) == [0], job.output()
    return job.output()


def test_a_damaged_file_is_named_and_made_again(server, inputs, stored, tmp_path):
    folder = tmp_path / "it"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("live", "stored"))
    before, path = contents(folder_of(folder)), folder_of(folder) / "train.npy"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    output = run(server, command(folder, folder / "run", STORED, "train.steps=1"), (0,), num_ranks=1)
    (warning,) = [line for line in output.splitlines() if "warning: " in line]
    assert str(folder_of(folder)) in warning and path.name in warning and warning.endswith("made again"), output
    assert contents(folder_of(folder)) == before


def test_files_that_are_cut_short_while_they_are_read_end_the_job_with_one_line(server, inputs, stored, tmp_path):
    folder = tmp_path / "it"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns("live", "stored"))
    job = server.start(
        TRAIN,
        command(folder, folder / "run", STORED),
        env={"HOMODISTIL_FAULT": "train.step:hit=3:action=stop"},
        num_ranks=1,
    )
    while psutil.Process(job.pids[0]).status() != psutil.STATUS_STOPPED:
        assert job.is_running(), job.output()
        time.sleep(0.02)
    with open(folder_of(folder) / "train.npy", "r+b") as file:
        file.truncate(200)
    job.kill(None, signal.SIGCONT)
    assert job.wait(timeout_s=180) == [USER_ERROR], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert "train.npy: was cut short while it was being read" in line and "computes the teacher's outputs again" in line
