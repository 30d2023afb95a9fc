"""A token classifier through the launcher's own script: events, held-out tokens, the exported folder; and bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.test_classifier import arguments, settled, write_teacher
from safetensors.torch import load_file, save_file
from support import launched_run
from support.launched_run import StageRuns
from support.tiny_decoder import write_text
from transformers import (
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    pipeline,
)

from homodistil.errors import UserError
from homodistil.evaluation.token_scores import token_sums

STAGES = (2, 3)
NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
FRAMING = (0, 2, 3)
"""Ids of [PAD], [CLS] and [SEP]."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher` of four labels, and texts."""
    folder = tmp_path_factory.mktemp("token_classifier")
    documents = [path.read_text() for path in write_text(folder / "text").glob("*.txt")]
    words = sorted({word.strip(".") for document in documents for word in document.split()})
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    write_teacher(folder / "teacher", words, BertForTokenClassification, **labels)
    write_teacher(folder / "of_texts", words, BertForSequenceClassification, **labels)
    return folder


@pytest.fixture(scope="module")
def runs(server, materials) -> StageRuns:
    def run_stage(stage: int) -> Path:
        command = arguments(materials, materials / f"run{stage}", stage, "data.texts=sentence")
        (materials / f"zero{stage}.txt").write_text(launched_run.run(server, command))
        return materials / f"run{stage}"

    return StageRuns(run_stage)


def heldout_logits(folder: Path, blocks: Path) -> torch.Tensor:
    """Of the tokens of the held-out texts, by the stock class alone."""
    ids = torch.from_numpy(np.load(blocks).astype(np.int64))
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != FRAMING[0]).long()).logits
    return logits[~torch.isin(ids, torch.tensor(FRAMING))]


@pytest.mark.full
def test_the_teacher_makes_it_a_token_classifier(runs):
    output = (runs[2].parent / "zero2.txt").read_text()
    assert "token_scores; logits of the tokens of single texts (sentence) of at most 32 tokens" in output
    assert "rotation at full width: KL of labels" in output and "compensation full" in output
    assert "scores_kl x 4" in output and "same label" in output and "KL to teacher" in output
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    assert (teacher["kl_to_teacher"], teacher["token_agreement"]) == (0, 1)
    assert 0 < student["kl_to_teacher"] < 1 and 0.4 < student["token_agreement"] <= 1


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_the_student_shrinks_and_comes_back(runs, stage):
    events = launched_run.lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3 and events[-1]["widths_after"]["hidden"] == 16
    assert "classifier" not in events[-1]["widths_after"]
    assert all(event["gap_after"]["scores_kl"] > 0 for event in events)
    losses = [line for line in launched_run.lines(runs[stage] / "metrics.jsonl") if "loss/total" in line]
    assert abs(losses[0]["loss/scores_kl"]) < 1e-6 and losses[-1]["loss/scores_kl"] > 0


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_what_was_measured(runs, materials, stage):
    (blocks,) = materials.glob("cache/corpora/*/heldout.npy")
    ours, theirs = (heldout_logits(folder, blocks) for folder in (runs[stage] / "export", materials / "teacher"))
    distance, same, count = token_sums(ours, theirs, "categories").tolist()
    row = json.loads((runs[stage] / "result.json").read_text())[1]
    assert distance / count == pytest.approx(row["kl_to_teacher"], abs=1e-5) and len(ours) == count
    assert same / count == pytest.approx(row["token_agreement"], abs=0.005)  # near ties may turn


@pytest.mark.full
def test_the_export_has_the_teachers_labels(runs):
    export = runs[2] / "export"
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"] and config["hidden_size"] == 16
    assert config["id2label"] == {str(i): name for i, name in NAMES.items()}
    assert config["label2id"] == {name: i for i, name in NAMES.items()}
    entities = pipeline("token-classification", model=str(export), ignore_labels=[])("the cat sees a dog")
    assert [entity["word"] for entity in entities] == ["the", "cat", "sees", "a", "dog"]
    assert {entity["entity"] for entity in entities} <= set(NAMES.values())
    card = (export / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "AutoModelForTokenClassification.from_pretrained" in card
    assert "tokens with the teacher's label" in card and "texts with the teacher's label" not in card


def test_what_a_run_gives_a_token_classifier(materials):
    for fields in ((), ("data.task=scores",), ("data.task=token_scores",)):
        config = settled(materials / "teacher", *fields)
        assert (config.data.task, config.data.prompt, config.pruning.compensation) == ("token_scores", "none", "full")
        assert (config.loss.scores_kl, config.loss.scores_mse, config.pruning.compensation_sequences) == (4, 0, 512)
    config = settled(materials / "teacher", "data.task=none")
    assert (config.data.task, config.loss.scores_kl) == ("none", 0)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("teacher", ("data.pair_columns=[a,b]",), "data.pair_columns: found ['a', 'b'], but"),
        ("teacher", ("teacher.outputs=stored",), "teacher.outputs: found stored, allowed with data.task=token_scores"),
        ("teacher", ("data.task=scores", "pruning.importance=activation"), "the head of labels of data.task=scores"),
        ("teacher", ("pruning.importance=teacher_kl",), "pruning.importance: found teacher_kl, which draws"),
        ("teacher", ("data.task=embedding", "loss.scores_kl=1"), "loss.scores_kl: found 1.0, but data.task=embedding"),
        ("of_texts", ("data.task=token_scores",), "(found BertForSequenceClassification, expected ...ForTokenClassif"),
        ("no_head", (), "the weights lack 1 tensor that config.json asks for (classifier.weight)"),
        ("wide_head", (), "classifier.bias is 4 in the weights, 5 by config.json (and 1 more)"),
        ("gap", (), "has id2label with the numbers [0, 2, 3], expected 0 .. 2 without gaps"),
        ("backbone", (), "the weights lack 2 tensors that config.json asks for (classifier.bias, classifier.weight)"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_one_line(materials, name, fields, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        settled(broken(materials, name), *fields)
    assert "\n" not in str(caught.value)


def broken(materials: Path, name: str) -> Path:
    """A folder whose files do not fit, made of `teacher`'s."""
    folder = materials / name
    if folder.exists():
        return folder
    shutil.copytree(materials / "teacher", folder)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    left_out = {"no_head": ("classifier.weight",), "backbone": ("classifier.",)}.get(name, ())
    kept = {n: w for n, w in weights.items() if not n.startswith(tuple(left_out))}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    changes = {
        "wide_head": {"id2label": {i: str(i) for i in range(5)}, "label2id": {str(i): i for i in range(5)}},
        "gap": {"id2label": {0: "a", 2: "b", 3: "c"}, "label2id": {"a": 0, "b": 2, "c": 3}},
    }
    (folder / "config.json").write_text(json.dumps(config | changes.get(name, {})))
    return folder
