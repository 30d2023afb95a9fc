"""The end of a run with run.formats and run.latency: files beside the export, a table, and a run complete anyway."""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path

import pytest
from support.small_job import TRAIN, arguments

from homodistil.config.schema import DataConfig, RunFolderConfig
from homodistil.errors import UserError
from homodistil.export.formats.layout import FORMATS, Limits
from homodistil.training import final_formats

INT8 = FORMATS["gguf-q8_0"].file  # takes a second, ONNX ten


def finish(server, run_inputs, folder: Path, *wanted: str) -> str:
    """A run of two steps on two ranks; what the first one printed."""
    settings = [*wanted, "train.steps=2", "train.save_every_steps=0"]
    job = server.start(TRAIN, arguments(run_inputs, folder, *settings))
    assert job.wait(timeout_s=120) == [0, 0], job.output()
    return job.output(0)


def test_formats_lie_beside_the_stock_checkpoint(server, run_inputs, tmp_path, monkeypatch):
    """What is there is not made again, and what fails is a line."""
    folder, export = tmp_path / "run", tmp_path / "run" / "export"
    assert f"gguf-q8_0: {export}" in finish(server, run_inputs, folder, "run.formats=[gguf-q8_0]")
    assert (export / INT8).is_file() and (export / "model.safetensors").is_file()
    assert not (export / FORMATS["gguf"].file).exists()  # it was not asked for
    before = os.stat(export / INT8)
    run = RunFolderConfig()
    run.formats = ["gguf-q8_0"]
    assert final_formats.add_formats(folder, run, DataConfig()) == f"gguf-q8_0: {export}"
    after = os.stat(export / INT8)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (export / INT8).unlink()
    monkeypatch.setattr(final_formats, "Limits", lambda: Limits(min_cosine=2.0))
    said = final_formats.add_formats(folder, run, DataConfig())
    assert said.startswith("run.formats: ") and said.endswith(f"{export} is complete without it")
    assert "\n" not in said and not (export / INT8).exists()


@pytest.mark.full  # the measuring itself, and its page, are in tests/unit/export and tests/unit/report
def test_teacher_and_student_are_timed_for_the_report(server, run_inputs, tmp_path):
    folder = tmp_path / "run"
    printed = finish(server, run_inputs, folder, "run.latency=true", "run.report=true")
    rows = json.loads((folder / "latency.json").read_text())["rows"]
    names = {(row["checkpoint"], row["format"]) for row in rows}
    assert {("teacher", "torch"), ("homodistil", "torch"), ("homodistil", "onnx-int8")} <= names
    assert all(row["ms_per_sentence"] > 0 for row in rows) and "tokens 32, threads 1, rounds 15" in printed
    assert "ms/sentence" in printed and "latency" in (folder / "report.html").read_text().lower()


def test_missing_packages_are_told_before_anything_begins(monkeypatch):
    run = RunFolderConfig()
    final_formats.check_formats(run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    final_formats.check_formats(run)
    run.formats = ["onnx"]
    with pytest.raises(
        UserError, match=r"^run\.formats: onnx, onnxruntime, onnxscript not installed; .* leave it out$"
    ):
        final_formats.check_formats(run)
    run.formats, run.latency = [], True
    with pytest.raises(UserError, match=r"^run\.latency: onnx, "):
        final_formats.check_formats(run)


def test_every_format_may_be_asked_for():
    (choices,) = typing.get_args(typing.get_type_hints(RunFolderConfig)["formats"])
    assert set(typing.get_args(choices)) == set(FORMATS)
