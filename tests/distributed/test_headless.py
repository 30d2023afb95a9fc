"""An encoder without a language-modelling head through the launcher's own script: events, resume, table, export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import launched_run
from support.launched_run import StageRuns
from support.small import small_model
from support.tiny_decoder import write_text
from transformers import AutoModel, BertModel, BertTokenizerFast, pipeline

from homodistil.api import Distilled
from homodistil.config.schema import DataConfig, LossConfig
from homodistil.data.task import TASKS
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher, load_model
from homodistil.evaluation.distances import evaluate_distances

STUDENT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
STAGES = (2, 3)


def arguments(materials: Path, run_dir: Path, stage: int, *overrides: str) -> list[str]:
    """Without the weights of terms over the vocabulary that the small runs of other tests set."""
    command = launched_run.arguments(materials, run_dir, stage, STUDENT, *overrides)
    return [argument for argument in command if not argument.startswith("loss.kl=")]


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher`, an encoder with a pooler and no mask token, and `text`."""
    folder = tmp_path_factory.mktemp("headless")
    text = write_text(folder / "text")
    words = sorted({word.strip(".") for path in text.glob("*.txt") for word in path.read_text().split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *words]))
    model = small_model(max_position_embeddings=40)
    encoder = BertModel(model.config)
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder / "teacher")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def runs(server, materials) -> StageRuns:
    def run_stage(stage: int) -> Path:
        run_dir = materials / f"run{stage}"
        output = launched_run.run(server, arguments(materials, run_dir, stage, f"run.report={stage == 2}".lower()))
        (materials / f"zero{stage}.txt").write_text(output)
        return run_dir

    return StageRuns(run_stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_student_shrinks_and_is_refitted_without_a_head(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3 and events[-1]["widths_after"]["hidden"] == 16
    for event in events:
        assert not {"kl", "mlm"} & set(event["gap_after"]) and event["gap_after"]["attention"] > 0
        assert event["gap_after"]["total"] < event["total_after_cut"]  # the refit helps
    losses = [line for line in launched_run.lines(runs[stage] / "metrics.jsonl") if "loss/total" in line]
    assert losses[0]["loss/total"] == 0 < losses[-1]["loss/total"]
    assert not any(name.endswith(("/mlm", "/kl", "mlm_loss", "kl_to_teacher")) for line in losses for name in line)


def test_the_run_says_what_it_does(runs, materials):
    output = (runs[2].parent / "zero2.txt").read_text()
    assert "has no language-modelling head: task none" in output
    assert "losses: hidden x 1 (raw), attention x 1 (scores)," in output
    assert "hidden distance" in output and "KL" not in output and "MLM" not in output
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    for term in ("hidden", "attention", "embedding"):
        assert teacher[f"{term}_distance"] == 0 < student[f"{term}_distance"]
    encoder = BertModel.from_pretrained(materials / "teacher", add_pooling_layer=False)
    assert teacher["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert "loss before" in (runs[2] / "report.html").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(server, runs, materials, tmp_path, stage):
    copy = launched_run.without_end(runs[stage], tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, stage, "run.resume=auto"))
    assert launched_run.same_export(copy, runs[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_the_student_in_a_stock_class(runs, materials, stage):
    """On held-out text it is as far from the teacher's attention maps as the result table says of the student."""
    export = runs[stage] / "export"
    model, report = AutoModel.from_pretrained(export, output_loading_info=True)
    assert type(model) is BertModel and model.config.hidden_size == 16
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"]
    with safe_open(export / "model.safetensors", "pt") as file:
        assert not any(name.startswith(("cls.", "bert.", "pooler.")) for name in file.keys())  # noqa: SIM118

    (blocks,) = materials.glob("cache/corpora/*/heldout.npy")
    tokenizer = BertTokenizerFast.from_pretrained(export)
    blocks = np.load(blocks).astype(np.int64)
    batch = TASKS["none"].batch_maker(tokenizer, DataConfig(task="none"), 0).without_targets(blocks)
    alone = LossConfig().only(attention=1.0)
    student = Student(load_model(str(export), head="none"), alone).eval()
    teacher = Teacher(load_model(str(materials / "teacher"), head="none"))
    measured = evaluate_distances(student, teacher, [batch], torch.device("cpu"))
    row = json.loads((runs[stage] / "result.json").read_text())[1]
    assert measured["attention_distance"] == pytest.approx(row["attention_distance"], rel=1e-3)


def test_it_serves_features(runs):
    card = (runs[2] / "export" / "README.md").read_text()
    assert "feature-extraction" in card and "AutoModel.from" in card and "no pooler" in card and "KL" not in card
    features = pipeline("feature-extraction", model=str(runs[2] / "export"))("the cat sees a dog")
    assert len(features[0]) == 7 and len(features[0][0]) == 16
    assert type(Distilled(runs[2], []).student) is BertModel


def test_a_projection_is_chosen_by_hidden_states(server, materials):
    """compensation=full without a head: nothing predicts anything, and the check looks at hidden states."""
    run_dir = materials / "full"
    output = launched_run.run(server, arguments(materials, run_dir, 2, "pruning.compensation=full"))
    assert "rotation at full width: variance of hidden states lost, +" in output
    events = launched_run.lines(run_dir / "events.jsonl")
    assert len(events) >= 3 and all(event["gap_after"]["total"] < event["total_after_cut"] for event in events)
    assert AutoModel.from_pretrained(run_dir / "export").config.hidden_size == 16
