"""From 12 layers to 7 in a whole job: live under ZeRO-2 and ZeRO-3 while widths fall, refitted, killed and resumed,
exported; and before the first step, by block influence, as they were."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.fork_server import ROOT
from support.launched_run import StageRuns
from support.small_job import TRAIN, arguments, differences, make_materials, result
from transformers import AutoModelForMaskedLM

BY_INFLUENCE = ("student.num_hidden_layers=7", "student.layer_choice=influence", "pruning.calibration_batches=1")
BY_INFLUENCE += ("train.global_batch_size=4", "train.eval_every_steps=0")
LIVE = (*BY_INFLUENCE, "pruning.depth_schedule=linear", "run.keep_checkpoints=9")
LIVE += ("pruning.compensation=refit", "pruning.compensation_sequences=8")
ENGINES = {2: ROOT / "ds_configs" / "zero2_fp32.json", 3: ROOT / "ds_configs" / "zero3_fp32.json"}
KILLED = {"HOMODISTIL_FAULT": "train.step:hit=8"}
"""Two events and a checkpoint behind the one of step 6."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    make_materials(folder, num_hidden_layers=12)
    return folder


@pytest.fixture(scope="module")
def runs(server, deep, tmp_path_factory) -> StageRuns:
    """ZeRO stage -> folder of a run that nothing happened to."""

    def run(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"stage{stage}") / "run"
        train(server, deep, folder, stage)
        return folder

    return StageRuns(run)


def train(server, deep: Path, folder: Path, stage: int, *overrides: str, num_ranks: int = 2) -> str:
    job = server.start(TRAIN, arguments(deep, folder, *LIVE, *overrides, engine=ENGINES[stage]), num_ranks)
    assert job.wait(timeout_s=300) == [0] * num_ranks, job.output()
    return job.output()


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ENGINES)
def test_layers_leave_one_at_a_time_while_widths_fall(runs, stage):
    lines = events(runs[stage])
    depths = [line for line in lines if line["changed"] == ["layers"]]
    assert [(line["step"], len(line["layers_after"])) for line in depths] == [(2, 11), (4, 10), (5, 9), (7, 8), (9, 7)]
    assert any("hidden" in line["changed"] for line in lines)
    layers = list(range(12))
    for line in depths:
        assert line["layers_before"] == layers
        (left,) = set(layers) - set(line["layers_after"])
        may_leave = {int(layer): value for layer, value in line["influence"].items() if int(layer)}
        assert left == min(may_leave, key=may_leave.get) and line["bytes_moved"] > 0
        assert math.isfinite(line["gap_after"]["kl"]) and line["milliseconds_write"] > 0
        assert 0 < line["variance_lost"] < 1 and math.isfinite(line["kl_after_cut"])
        layers = line["layers_after"]
    assert sum(axis.endswith(".ffn") for axis in lines[-1]["widths_after"]) == 7


def test_both_stages_take_out_the_same_layers_and_train_alike(runs):
    two, three = (events(runs[stage]) for stage in ENGINES)
    assert [line.get("layers_after") for line in two] == [line.get("layers_after") for line in three]
    assert two[-1]["gap_after"]["kl"] == pytest.approx(three[-1]["gap_after"]["kl"], rel=1e-4)


@pytest.mark.parametrize("stage", ENGINES)
def test_the_export_is_the_stock_class_with_fewer_layers(runs, stage):
    export = AutoModelForMaskedLM.from_pretrained(runs[stage] / "export").eval()
    assert (export.config.num_hidden_layers, export.config.hidden_size) == (7, 12)
    (row,) = (row for row in json.loads((runs[stage] / "result.json").read_text()) if row["name"] == "homodistil")
    assert row["parameters"] == export.num_parameters()
    with torch.no_grad():
        assert torch.isfinite(export(input_ids=torch.arange(5, 21)[None]).logits).all()


@pytest.mark.parametrize("stage", ENGINES)
def test_a_killed_run_ends_as_if_nothing_had_happened(server, deep, runs, tmp_path, stage):
    job = server.start(TRAIN, arguments(deep, tmp_path / "run", *LIVE, engine=ENGINES[stage]), env=KILLED)
    assert set(job.wait(timeout_s=300)) != {0}
    assert len(events(tmp_path / "run")) < len(events(runs[stage]))
    assert "resumed from step 6" in train(server, deep, tmp_path / "run", stage, "run.resume=must")
    assert not differences(result(tmp_path / "run"), result(runs[stage]))


def test_another_number_of_ranks_goes_on_from_a_checkpoint_behind_an_event(server, deep, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[2], folder)
    for behind in ("step-000009", "step-000010"):
        shutil.rmtree(folder / "checkpoints" / behind)
    (folder / "row.json").unlink(missing_ok=True)
    assert "resumed from step 6" in train(server, deep, folder, 3, "run.resume=must", num_ranks=1)
    assert [line.get("layers_after") for line in events(folder)] == [
        line.get("layers_after") for line in events(runs[2])
    ]
    ours, theirs = result(folder), result(runs[2])
    weights = [name for name in ours if isinstance(name, tuple) and "export" in str(name[0])]
    # Two events behind the checkpoint are refitted from sums over ranks, which are added up in another order: fp32
    # rounding, that a dozen solves on top of each other enlarge.
    assert weights and all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in weights)


def test_before_the_first_step_the_layers_of_least_influence_leave(server, deep, tmp_path):
    folder = tmp_path / "run"
    job = server.start(TRAIN, arguments(deep, folder, *BY_INFLUENCE, "pruning.schedule=one_shot"))
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    line, widths, *_ = events(folder)
    ranked = sorted((int(layer) for layer in line["influence"] if int(layer)), key=lambda i: line["influence"][str(i)])
    assert line["step"] == 0 and sorted(ranked[5:] + [0]) == line["layers_after"] and widths["changed"] != ["layers"]
    stay = ", ".join(map(str, line["layers_after"]))
    assert f"7 stay: {stay}" in job.output()
    assert AutoModelForMaskedLM.from_pretrained(folder / "export").config.num_hidden_layers == 7


def test_before_the_first_step_evenly_spread_layers_take_over_what_the_others_did(server, deep, tmp_path):
    """The default: no copy, but an event; a run that goes on from a checkpoint has the same layers."""
    folder, compensated = tmp_path / "run", ("pruning.compensation=full", "pruning.compensation_sequences=32")
    given = arguments(
        deep, folder, *BY_INFLUENCE, "student.layer_choice=uniform", "pruning.schedule=one_shot", *compensated
    )
    job = server.start(TRAIN, given, env=KILLED)
    assert set(job.wait(timeout_s=300)) != {0}
    job = server.start(TRAIN, [*given, "run.resume=must"])
    assert job.wait(timeout_s=300) == [0, 0] and "resumed from step 6" in job.output(), job.output()
    line, *_ = events(folder)
    assert (line["step"], line["layers_after"]) == (0, [0, 2, 3, 5, 7, 9, 10])
    assert line["gap_after"]["kl"] < 0.7 * line["kl_after_cut"]
    assert AutoModelForMaskedLM.from_pretrained(folder / "export").config.num_hidden_layers == 7
