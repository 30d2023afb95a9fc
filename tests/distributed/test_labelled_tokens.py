"""Labels of words through the launcher's own script on two ranks: training, events, resume, measures, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import test_classifier
from distributed.test_labelled_classifier import check_learned
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score
from support import launched_run
from support.launched_run import TRAIN
from support.tiny_decoder import write_text
from transformers import AutoModelForTokenClassification, BertForTokenClassification, BertTokenizerFast

NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
NUM_TEXTS = 200


def arguments(materials: Path, run_dir: Path, *overrides: str) -> list[str]:
    columns = ("data.text_column=tokens", "data.label_column=tags", "data.heldout_fraction=0.3")
    return test_classifier.arguments(materials, run_dir, 2, *columns, *overrides)


def tags_of(folder: Path, texts: list[list[str]]) -> list[list[int]]:
    """What the teacher says at the first token of each word, by the stock class alone."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tags = []
    for words in texts:
        encoding = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            said = model(**encoding).logits[0].argmax(-1).tolist()
        owners = encoding.word_ids()
        tags.append([said[owners.index(number)] for number in range(len(words))])
    return tags


def write(folder: Path, texts: list[list[str]], tags: list[list]) -> None:
    folder.mkdir()
    rows = [{"tokens": words, "tags": labels} for words, labels in zip(texts, tags, strict=True)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """Words with a teacher's labels, of which a sixth is wrong and a sixth is not there: `text` by name, `permuted` by
    numbers in another order."""
    folder, draw = tmp_path_factory.mktemp("labelled_tokens"), random.Random(0)
    documents = [path.read_text() for path in sorted(write_text(folder / "documents").glob("*.txt"))]
    words = sorted({word.strip(".") for document in documents for word in document.split()})
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    test_classifier.write_teacher(folder / "teacher", words, BertForTokenClassification, **labels)
    texts = [draw.choices(words, k=draw.randint(1, 24)) for _ in range(NUM_TEXTS)]
    tags = [
        [draw.randrange(4) if draw.random() < 1 / 6 else tag for tag in row]
        for row in tags_of(folder / "teacher", texts)
    ]
    named = [[None if draw.random() < 1 / 6 else NAMES[tag] for tag in row] for row in tags]
    write(folder / "text", texts, named)
    write(folder / "permuted", texts, [[(tag + 1) % 4 for tag in row] for row in tags])
    return folder


def names_by_text(numbers: np.ndarray, known: np.ndarray) -> list[list[str]]:
    """Names of the labels of each text's labelled tokens."""
    return [[NAMES[int(number)] for number in row[has]] for row, has in zip(numbers, known, strict=True)]


@pytest.fixture(scope="module")
def finished(server, materials) -> Path:
    (materials / "said.txt").write_text(launched_run.run(server, arguments(materials, materials / "run")))
    return materials / "run"


def test_the_student_learns_them_beside_the_teacher(finished, materials):
    output = (materials / "said.txt").read_text()
    assert "token_scores; logits of the tokens of single texts (document)" in output and "macro-F1" in output
    check_learned(finished, output)


def test_what_is_measured_is_what_the_stock_model_answers(finished, materials):
    (path,) = materials.glob("cache/corpora/*/heldout_labels.npy")
    labels = np.load(path)
    ids, known = torch.from_numpy(np.load(path.with_name("heldout.npy")).astype(np.int64)), ~np.isnan(labels)
    assert labels.shape == ids.shape and 0 < known.sum() < (ids > 3).sum()
    rows = json.loads((finished / "result.json").read_text())
    for folder, row in zip((materials / "teacher", finished / "export"), rows, strict=True):
        model = AutoModelForTokenClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            answers = model(ids, attention_mask=(ids > 0).long()).logits.argmax(-1).numpy()
        expected, said = labels[known].astype(int), answers[known]
        assert row["label_accuracy"] == pytest.approx((said == expected).mean(), abs=0.01)  # near ties may turn
        assert row["label_macro_f1"] == pytest.approx(f1_score(expected, said, average="macro"), abs=0.02)
        whole = entity_f1(*(names_by_text(numbers, known) for numbers in (labels, answers)))
        assert 0 < whole <= 1 and row["label_entity_f1"] == pytest.approx(whole, abs=0.02)
    assert "F1 of tokens, mean over labels" in (finished / "export" / "README.md").read_text()


@pytest.mark.full
def test_resume_is_bitwise(server, finished, materials, tmp_path):
    copy = launched_run.without_end(finished, tmp_path / "run")
    launched_run.run(server, arguments(materials, copy, "run.resume=auto"))
    assert launched_run.same_export(copy, finished)


@pytest.mark.full
def test_labels_in_another_order_are_refused_before_anything_is_there(server, materials):
    run_dir, source = materials / "refused", f"data.sources=[{materials / 'permuted'}]"
    job = server.start(TRAIN, arguments(materials, run_dir, source))
    assert job.wait(timeout_s=120) == [2, 2] and not run_dir.exists()
    (line,) = [line for line in job.output().splitlines() if "data.label_column" in line]
    assert "held-out tokens the label in 'tags'" in line and "check_label_order=false" in line
    assert "if its numbers meant 0=B-LOC, 1=O, 2=B-PER, 3=I-PER" in line
    launched_run.run(server, arguments(materials, run_dir, source, "data.check_label_order=false", "train.steps=2"))


@pytest.mark.full
def test_a_check_reads_them(server, materials):
    job = server.start(TRAIN, [*arguments(materials, materials / "checked"), "--check"])
    assert job.wait(timeout_s=120) == [0, 0], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("labels ")]
    assert " ok " in line and f"'tags' of {NUM_TEXTS} texts read" in line
