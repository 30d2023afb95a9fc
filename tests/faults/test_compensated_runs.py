"""Compensated events in the real job on two ranks: they make up for the cut, and a killed run ends bitwise the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fork_server import ROOT
from support.small_job import STEPS, TRAIN, arguments, differences, result

FULL = ["pruning.compensation=full", "pruning.compensation_sequences=24", "pruning.interval_steps=3"]
LEARNED = ["pruning.compensation=project", "pruning.basis=learned", "pruning.basis_steps=4"]
ONE_SHOT = ["pruning.schedule=one_shot", "pruning.one_shot_stages=2", "pruning.calibration_batches=2"]


def run(server, run_inputs, folder: Path, overrides: list[str], stage: str, fault: str | None = None) -> list[int]:
    engine = ROOT / "ds_configs" / f"{stage}.json"
    fields = arguments(run_inputs, folder, *overrides, engine=engine)
    job = server.start(TRAIN, fields, env={"HOMODISTIL_FAULT": fault} if fault else {})
    codes = job.wait(timeout_s=180)
    if not fault:
        assert codes == [0, 0], job.output()
    return codes


def check_killed_and_resumed(server, run_inputs, tmp_path, overrides: list[str], stage: str, fault: str) -> list[dict]:
    run(server, run_inputs, tmp_path / "whole", overrides, stage)
    # Both ranks kill themselves: none is left to wait for the other.
    assert run(server, run_inputs, tmp_path / "killed", overrides, stage, fault) == [-9, -9]
    assert not (tmp_path / "killed" / "export").exists()
    run(server, run_inputs, tmp_path / "killed", [*overrides, "run.resume=must"], stage)
    assert differences(result(tmp_path / "killed"), result(tmp_path / "whole")) == []
    return [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]


def check_events(events: list[dict], last_step: int) -> None:
    assert events[-1]["widths_after"]["hidden"] == 12 and events[-1]["step"] <= last_step
    for event in events:
        assert event["milliseconds_compensate"] > 0 and 0 <= event["variance_lost"] < 1


def check_refits(events: list[dict]) -> None:
    """The teacher is random, so there is little to win, but a projection alone would be a heavy loss."""
    for event in events:
        assert event["gap_after"]["kl"] < event["kl_after_cut"], event


@pytest.mark.parametrize("more", [[], LEARNED], ids=["full", "project, learned"])
def test_gradual_run_killed_inside_an_event(server, run_inputs, tmp_path, more):
    events = check_killed_and_resumed(server, run_inputs, tmp_path, [*FULL, *more], "zero2_fp32", "resize.moved:hit=2")
    assert len(events) >= 3
    check_events(events, STEPS)
    if not more:  # nothing is refitted behind a projection: a plain cut may be the nearer one, and is here
        check_refits(events)


def test_one_shot_in_stages_under_zero3_killed_in_training(server, run_inputs, tmp_path):
    """With dropout, whose draws go on behind the checkpoint as if nothing had happened."""
    overrides = [*FULL, *ONE_SHOT, "student.dropout=0.1"]
    events = check_killed_and_resumed(server, run_inputs, tmp_path, overrides, "zero3_fp32", "train.step:hit=8")
    assert [event["step"] for event in events] == [0, 0]
    assert [event["widths_after"]["hidden"] for event in events] == [17, 12]
    check_events(events, 0)
    check_refits(events)


def test_a_teacher_that_bears_no_rotation_is_refitted_also_after_a_kill(server, run_inputs, tmp_path):
    """Bitwise what pruning.compensation=refit gives."""
    shutil.copytree(run_inputs / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in weights if name.endswith("LayerNorm.weight")):
        weights[name] *= torch.exp(torch.randn(weights[name].shape, generator=generator))
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    fields = [*FULL, f"teacher.name={tmp_path / 'teacher'}", "pruning.compensation_limit=0"]
    run(server, run_inputs, tmp_path / "refit", [*fields, "pruning.compensation=refit"], "zero2_fp32")
    killed = tmp_path / "killed"
    assert run(server, run_inputs, killed, fields, "zero2_fp32", "train.step:hit=6") == [-9, -9]
    assert len((killed / "events.jsonl").read_text().splitlines()) == 1
    run(server, run_inputs, killed, [*fields, "run.resume=must"], "zero2_fp32")
    assert differences(result(killed), result(tmp_path / "refit")) == []


@pytest.mark.full
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("compensation", ["refit", "full"])
def test_every_engine_runs_compensated_events(server, run_inputs, tmp_path, stage, compensation):
    overrides = [*FULL, f"pruning.compensation={compensation}", "pruning.carry_moments=false"]
    run(server, run_inputs, tmp_path / "run", overrides, stage)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["widths_after"]["hidden"] == 12


@pytest.mark.full
@pytest.mark.parametrize("stage", ["zero2_fp32", "zero3"])
def test_closed_loop_tries_compensated_cuts(server, run_inputs, tmp_path, stage):
    """A trial promises what the event then does."""
    overrides = [*FULL, "pruning.schedule=gap", "pruning.gap_bound=0.05"]
    run(server, run_inputs, tmp_path / "run", overrides, stage)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["widths_after"]["hidden"] == 12
    for event in events:
        assert event["gap_forced"] or event["gap_rise"] <= 0.05 + 1e-3  # roundings: the trial ran on a plain copy
