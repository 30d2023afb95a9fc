"""Ground-truth labels through the launcher's own script on two ranks: training, events, resume, measures, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.test_classifier import LAYERS, NAMES, STUDENT, heldout_logits, write_teacher
from support import launched_run
from support.launched_run import TRAIN
from support.tiny_decoder import write_text
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

pytestmark = pytest.mark.full
NUM_TEXTS, SEQ_LEN = 300, 32


def arguments(materials: Path, run_dir: Path, *overrides: str) -> list[str]:
    command = launched_run.arguments(materials, run_dir, 2, STUDENT, "data.label_column=label", *overrides)
    fields = ("pruning.compensation_sequences=48", "data.heldout_fraction=0.3")
    return [argument for argument in command if not argument.startswith("loss.kl=")] + list(fields)


def stock_labels(folder: Path, texts: list[str]) -> list[int]:
    """What the teacher says, by the stock class alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.argmax(-1).tolist()


def write_labelled(folder: Path, texts: list[str], labels: list) -> None:
    folder.mkdir()
    lines = (json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True))
    (folder / "texts.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """Texts with a teacher's labels, of which a sixth is wrong and a sixth is not there: `text` by name, `permuted` by
    numbers in another order."""
    folder, draw = tmp_path_factory.mktemp("labelled"), random.Random(0)
    documents = [path.read_text() for path in sorted(write_text(folder / "documents").glob("*.txt"))]
    sentences = sorted({sentence for document in documents for sentence in document.split(". ")})
    words = sorted({word.strip(".") for document in documents for word in document.split()})
    write_teacher(folder / "teacher", words, id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    texts = [" ".join(draw.choices(sentences, k=draw.randint(1, 3))) + "." for _ in range(NUM_TEXTS)]
    labels = stock_labels(folder / "teacher", texts)
    labels = [draw.randrange(3) if draw.random() < 1 / 6 else label for label in labels]
    is_there = [draw.random() > 1 / 6 for _ in labels]
    for name, value_of, missing in (("text", NAMES.get, None), ("permuted", lambda i: (i + 1) % 3, -100)):
        values = [value_of(i) if there else missing for i, there in zip(labels, is_there, strict=True)]
        write_labelled(folder / name, texts, values)
    return folder


@pytest.fixture(scope="module")
def finished(server, materials) -> Path:
    (materials / "said.txt").write_text(launched_run.run(server, arguments(materials, materials / "run")))
    return materials / "run"


def test_the_student_learns_them_beside_the_teacher(finished, materials):
    check_learned(finished, (materials / "said.txt").read_text())


def check_learned(finished: Path, output: str) -> None:
    """The term of labels beside the teacher's in every step, through events; more right answers than chance's."""
    assert "labels x 1" in output and "scores_kl x 4" in output and "accuracy" in output
    logged = [line for line in launched_run.lines(finished / "metrics.jsonl") if "loss/total" in line]
    assert all(line["loss/labels"] > 0 for line in logged) and len(launched_run.lines(finished / "events.jsonl")) >= 3
    teacher, student = json.loads((finished / "result.json").read_text())
    assert 0.7 < teacher["label_accuracy"] < 1 and 0.3 < student["label_accuracy"] < 1


def test_what_is_measured_is_the_stock_models_accuracy(finished, materials):
    (path,) = materials.glob("cache/corpora/*/heldout_labels.npy")
    labels = np.load(path)[:, 0]
    rows = json.loads((finished / "result.json").read_text())
    for folder, row in zip((materials / "teacher", finished / "export"), rows, strict=True):
        right = heldout_logits(folder, path.with_name("heldout.npy")).argmax(-1).numpy() == labels
        assert row["label_accuracy"] == pytest.approx(right[~np.isnan(labels)].mean(), abs=0.02)  # near ties may turn
    assert 0 < np.isnan(labels).mean() < 0.5


def test_resume_is_bitwise(server, finished, materials, tmp_path):
    copy = launched_run.without_end(finished, tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, "run.resume=auto"))
    assert launched_run.same_export(copy, finished)


def test_with_stored_outputs_it_is_bitwise_the_run_with_the_teacher_in_it(server, materials):
    folders = [materials / outputs for outputs in ("live", "stored")]
    alone = [f"loss.{name}=0" for name in LAYERS]
    for folder in folders:
        fields = (f"teacher.outputs={folder.name}", "run.grow_micro_batch=true", *alone)
        launched_run.run(server, arguments(materials, folder, *fields))
    assert launched_run.same_export(*folders)


def test_labels_in_another_order_are_refused_before_anything_is_there(server, materials):
    run_dir, source = materials / "refused", f"data.sources=[{materials / 'permuted'}]"
    job = server.start(TRAIN, arguments(materials, run_dir, source))
    assert job.wait(timeout_s=120) == [2, 2] and not run_dir.exists()
    (line,) = [line for line in job.output().splitlines() if "data.label_column" in line]
    assert "if its numbers meant 0=neutral, 1=contradiction, 2=entailment" in line and "check_label_order=false" in line
    launched_run.run(server, arguments(materials, run_dir, source, "data.check_label_order=false", "train.steps=2"))


def test_a_check_reads_the_labels(server, materials):
    job = server.start(TRAIN, [*arguments(materials, materials / "checked"), "--check"])
    assert job.wait(timeout_s=120) == [0, 0], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("labels ")]
    assert " ok " in line and f"'label' of {NUM_TEXTS} texts read" in line
