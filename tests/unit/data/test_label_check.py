"""Labels that `homodistil check` reads: the first of each file, with the file and line of one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig

from homodistil.config.schema import DataConfig
from homodistil.preflight import labels as labels_check
from homodistil.preflight.findings import Findings
from homodistil.preflight.labels import SAMPLE_LABELS, check_labels

TEACHER = BertConfig(id2label={0: "no", 1: "yes"}, problem_type="single_label_classification")


def checked(folder: Path, labels: list, column: str = "label") -> Findings:
    """Findings on a file with a text for each of these labels."""
    lines = (json.dumps({"text": f"text {number}", "label": label}) for number, label in enumerate(labels))
    (folder / "a.jsonl").write_text("\n".join(lines))
    findings = Findings()
    check_labels(findings, DataConfig(task="scores", sources=[str(folder)], label_column=column), TEACHER)
    return findings


def test_texts_with_and_without_a_label_are_counted(tmp_path):
    (finding,) = checked(tmp_path, ["yes", None, 0, "no", -100])
    assert finding.is_good and finding.found.endswith("'label' of 5 texts read, 3 with a label")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["yes", "yess"], "a.jsonl:2: 'label' holds 'yess' (did you mean 'yes'?)"),
        (["no", 2], "a.jsonl:2: 'label' holds 2"),
    ],
)
def test_a_label_that_the_teacher_does_not_have_is_named(tmp_path, labels, said):
    (finding,) = checked(tmp_path, labels)
    assert not finding.is_good and finding.subject == "labels"
    assert said in finding.found and "write null" in finding.fix


def test_no_more_labels_are_read_than_the_sample_has(tmp_path):
    (finding,) = checked(tmp_path, ["yes"] * SAMPLE_LABELS + ["maybe"])
    assert finding.is_good and f"{SAMPLE_LABELS:,} texts read" in finding.found


def test_a_column_that_is_not_there_is_named(tmp_path):
    (finding,) = checked(tmp_path, ["yes"], column="truth")
    assert not finding.is_good and "truth" in finding.found


def test_nothing_is_read_where_labels_are_not(tmp_path):
    assert checked(tmp_path, ["maybe"], column="") == []


@pytest.mark.parametrize("is_missing", [False, True])
def test_what_is_missing_for_whole_entities_is_told(tmp_path, monkeypatch, is_missing):
    monkeypatch.setattr(labels_check, "seqeval_is_missing", lambda: is_missing)
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": ["Anna", "waits"], "tags": ["B-PER", "O"]}))
    columns = {"text_column": "tokens", "label_column": "tags"}
    findings, data = Findings(), DataConfig(task="token_scores", sources=[str(tmp_path)], **columns)
    check_labels(findings, data, BertConfig(id2label={0: "O", 1: "B-PER"}, problem_type="single_label_classification"))
    assert all(finding.is_good for finding in findings)
    assert [finding.found for finding in findings if "pip install seqeval" in finding.found] == [
        "the result table will have no entity F1, as seqeval is not installed: pip install seqeval"
    ] * is_missing
