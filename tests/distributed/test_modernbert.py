"""An encoder with windows through the launcher's own script: events on a live engine, resume, stock export."""

import json
from pathlib import Path

import pytest
import torch
from support import launched_run
from support.launched_run import StageRuns, arguments
from support.tiny_decoder import write_text
from support.tiny_modernbert import write_modernbert
from transformers import AutoModelForMaskedLM, pipeline

STUDENT = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
_FULL = "pruning.compensation=full"


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher` and `text`."""
    folder = tmp_path_factory.mktemp("modernbert")
    write_modernbert(folder / "teacher", write_text(folder / "text"))
    return folder


@pytest.fixture(scope="module")
def runs(server, materials) -> StageRuns:
    def run_stage(stage: int) -> Path:
        launched_run.run(server, arguments(materials, materials / f"run{stage}", stage, STUDENT, _FULL))
        return materials / f"run{stage}"

    return StageRuns(run_stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_whole_heads_fall_in_events(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3
    last = events[-1]["widths_after"]
    assert (last["hidden"], last["layer.0.heads"], last["layer.2.qk_dim"], last["layer.2.ffn"]) == (32, 4, 8, 40)


def test_stages_agree_and_the_start_is_the_teacher(runs):
    launched_run.check_stages_agree(runs[2], runs[3])


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bitwise(server, runs, materials, tmp_path, stage):
    copy = launched_run.without_end(runs[stage], tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, stage, STUDENT, _FULL, "run.resume=auto"))
    assert launched_run.same_export(copy, runs[stage])


def test_the_export_fills_masks_without_our_code(runs):
    model = AutoModelForMaskedLM.from_pretrained(runs[2] / "export").eval()
    assert type(model).__name__ == "ModernBertForMaskedLM"
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.local_attention) == (32, 4, 12)
    fill = pipeline("fill-mask", model=str(runs[2] / "export"))
    assert len(fill(f"the {fill.tokenizer.mask_token} sees the cat")) == 5
    assert torch.isfinite(model(torch.full((1, 64), 5)).logits).all()
    card = (runs[2] / "export" / "README.md").read_text()
    assert "fill-mask" in card and "AutoModelForMaskedLM" in card
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    assert teacher["kl_to_teacher"] == 0 < student["kl_to_teacher"] and "masked_top1" in student
