"""GLUE's data: every official layout with its odd rows, the hub's, the packaged sets; every mistake is one line."""

from __future__ import annotations

import dataclasses
import math

import datasets
import numpy as np
import pytest
from support.glue_files import FIRST, HEADERS, SECOND, header, row, write_glue, write_tsv

from homodistil.data.sources import assets, embedded_labelled
from homodistil.data.sources.downloads import fetch
from homodistil.errors import UserError
from homodistil.evaluation.glue.metrics import compute
from homodistil.evaluation.glue.sources import chosen_tasks, from_hub_splits, load_task
from homodistil.evaluation.glue.tasks import MOVIE, TASKS, find_task
from homodistil.evaluation.glue.tsv import read_split


def refuse(pattern: str, call, *arguments) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TASKS)
def test_official_layout(name, tmp_path):
    task = TASKS[name]
    data = load_task(task, str(write_glue(tmp_path)), tmp_path)
    assert list(data.dev) == (["m", "mm"] if name == "mnli" else [""])
    assert len(data.train.labels) == 8 and all(len(split.labels) == 6 for split in data.dev.values())
    first = FIRST.lower() if name == "sst2" else FIRST
    one = f"{first} 3 " if name == "sst2" else f"{first} 3"
    assert data.train.texts[3] == ((one,) if len(task.texts) == 1 else (one, f"{SECOND} 3"))
    expected = {"stsb": [0.0, 5.0, 2.5, 3.8], "mnli": [1, 0, 2, 1], "qnli": [1, 0, 1, 0], "rte": [1, 0, 1, 0]}
    assert data.train.labels[:4] == expected.get(name, [0, 1, 0, 1])


def test_quotes_line_ends_and_marks_belong_to_the_text(tmp_path):
    """MRPC's own file: a byte order mark, unbalanced quotes, CR LF; U+2028, U+0085, CR are no line ends."""
    texts = ('"We have', 'a 5" gun", he\u2028said\u0085so\rthere')
    rows = [HEADERS["MRPC"], ["1", "1", "2", *texts], ["0", "3", "4", "b", ""]]
    rows[0] = ["\ufeffQuality", *rows[0][1:]]
    split = read_split(TASKS["mrpc"], write_tsv(tmp_path / "train.tsv", rows, end="\r\n"))
    assert split == ([texts, ("b", "")], [1, 0], 0)


def test_column_order_does_not_matter_but_names_do(tmp_path):
    rows = [["label", "sentence"], ["1", "fine"]]
    assert read_split(TASKS["sst2"], write_tsv(tmp_path / "a.tsv", rows)).texts == [("fine",)]
    rows[0] = ["label", "text"]
    file = write_tsv(tmp_path / "b.tsv", rows)
    refuse(r"b\.tsv: found columns 'label', 'text'; SST-2 needs sentence, label", read_split, TASKS["sst2"], file)


def test_qqp_rows_with_missing_fields_are_left_out(tmp_path):
    whole = [row("QQP", i, str(i % 2), False) for i in range(5)]
    rows = [HEADERS["QQP"], whole[0], ["7", "1", "2", "half a row"], *whole[1:], ["only id"]]
    split = read_split(TASKS["qqp"], write_tsv(tmp_path / "train.tsv", rows))
    assert split.labels == [0, 1, 0, 1, 0] and split.num_broken == 2
    broken = write_tsv(tmp_path / "broken.tsv", [HEADERS["QQP"], *whole, *[["x"]] * 11])
    refuse(r"found 11 rows with a wrong number of fields \(the first in line 7\)", read_split, TASKS["qqp"], broken)


def test_wrong_fields_labels_and_files(tmp_path):
    def attempt(pattern, name, *rows):
        refuse(pattern, read_split, TASKS[name], write_tsv(tmp_path / "t.tsv", list(rows)))

    attempt(
        r"t\.tsv, line 3: found 3 TAB-separated fields, RTE has 4",
        "rte",
        HEADERS["RTE"],
        list("1ab") + ["entailment"],
        list("2ab"),
    )
    attempt(
        r"line 2: found label 'maybe', RTE allows entailment, not_entailment", "rte", HEADERS["RTE"], [*"1ab", "maybe"]
    )
    attempt(r"line 1: found label 'label', CoLA allows 0, 1", "cola", ["source", "label", "mark", "sentence"])
    attempt(r"line 2: found label '-', MNLI allows", "mnli", header("MNLI", True), row("MNLI", 0, "-", True))
    for score in ("5.1", "-0.1", "nan", "high"):
        attempt(
            rf"found similarity '{score}', STS-B allows numbers from 0 to 5",
            "stsb",
            HEADERS["STS-B"],
            row("STS-B", 0, score, True),
        )
    attempt(r"found no example", "wnli", HEADERS["WNLI"])
    attempt(r"found columns an empty file", "wnli")
    # A test file has no labels.
    attempt(r"found columns 'index', 'sentence1', 'sentence2'; WNLI needs", "wnli", HEADERS["WNLI"][:-1], list("1ab"))
    (tmp_path / "t.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    refuse(r"not UTF-8", read_split, TASKS["sst2"], tmp_path / "t.tsv")


def test_missing_folders_and_splits(tmp_path):
    folder = write_glue(tmp_path / "glue_data")
    (folder / "MNLI" / "dev_mismatched.tsv").unlink()
    needs = r"dev_mismatched\.tsv: not found \(found in .*MNLI: dev_matched\.tsv, train\.tsv\); MNLI needs"
    refuse(needs, load_task, TASKS["mnli"], str(folder), tmp_path)
    (folder / "RTE").rename(folder / "rte-1")
    refuse(r"RTE/train\.tsv: not found \(found in .*: CoLA, .*rte-1\)", load_task, TASKS["rte"], str(folder), tmp_path)
    refuse(r"--data: found '/nowhere', which is no folder", chosen_tasks, "all", "/nowhere")
    refuse(
        r"--data: found 'embedded:sts', packaged are .*did you mean 'embedded:sts-b'",
        chosen_tasks,
        "all",
        "embedded:sts",
    )


def test_choice_of_tasks(tmp_path):
    assert [task.name for task in chosen_tasks("all", str(tmp_path))] == list(TASKS)
    assert [task.name for task in chosen_tasks("all", "embedded")] == ["stsb", "movie"]
    assert [task.name for task in chosen_tasks("all", "embedded:movie")] == ["movie"]
    assert [task.name for task in chosen_tasks("rte, cola,rte", "hub")] == ["rte", "cola"]
    refuse(r"--tasks: found 'sts-b', allowed: all, cola, .*did you mean 'stsb'", chosen_tasks, "sts-b", "hub")
    refuse(r"--tasks: found 'rte', --data embedded has stsb, movie", chosen_tasks, "rte", "embedded")


def hub_rows(labels, names=None, **columns):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"label": label})
    return datasets.Dataset.from_dict(columns | {"label": labels}, features=features)


def test_hub_rows(tmp_path):
    names = ["entailment", "neutral", "contradiction"]
    rows = hub_rows([2, 0], names, premise=["a", "b"], hypothesis=["c", "d"])
    splits = {"train": rows, "validation_matched": rows, "validation_mismatched": rows.select([1])}
    data = from_hub_splits(TASKS["mnli"], splits)
    assert data.train == ([("a", "c"), ("b", "d")], [2, 0], 0) and data.dev["mm"].labels == [0]
    pairs = hub_rows([4.5], sentence1=["a"], sentence2=["b"])
    assert from_hub_splits(TASKS["stsb"], {"train": pairs, "validation": pairs}).dev[""] == ([("a", "b")], [4.5], 0)

    refuse("found splits train, needs train, validation", from_hub_splits, TASKS["rte"], {"train": pairs})
    splits["train"] = hub_rows([1], names[::-1], premise=["a"], hypothesis=["b"])
    refuse("train: found labels .*in this order", from_hub_splits, TASKS["mnli"], splits)
    splits["train"] = hub_rows([-1], names, premise=["a"], hypothesis=["b"])
    refuse("found label '-1'", from_hub_splits, TASKS["mnli"], splits)
    splits["train"] = pairs
    refuse(r"missing: premise, hypothesis", from_hub_splits, TASKS["mnli"], splits)


def test_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refuse("--data: cannot load nyu-mll/glue, rte, from the hub", load_task, TASKS["rte"], "hub", tmp_path)


def test_packaged_sts_b(cache_dir):
    data = load_task(TASKS["stsb"], "embedded", cache_dir)
    assert (len(data.train.labels), len(data.dev[""].labels)) == (5749, 1500)
    assert data.train.texts[0] == ("A plane is taking off.", "An air plane is taking off.")
    assert data.train.labels[:3] == [5.0, 3.8, 3.8]
    test = read_split(TASKS["stsb"], assets.labelled_folder("embedded:sts-b", cache_dir) / "STS-B" / "test.tsv")
    assert len(test.labels) == 1379


def test_packaged_movie_sentences(cache_dir):
    data = load_task(MOVIE, "embedded:movie", cache_dir)
    train, dev = data.train, data.dev[""]
    assert (len(train.labels), len(dev.labels)) == (8173, embedded_labelled.NUM_MOVIE_DEV)
    known = dict(zip((text for (text,) in train.texts + dev.texts), train.labels + dev.labels, strict=True))
    assert known["By turns very dark and very funny."] == 1
    assert "Effective but too tepid biopic" not in known, "its rating is -0.6"
    # Shuffled: a split has both classes as often as the whole (0.501), within 4 standard deviations.
    assert abs(np.mean(dev.labels) - 0.501) < 4 * math.sqrt(0.25 / 1000)
    assert sum(a != b for a, b in zip(dev.labels, dev.labels[1:], strict=False)) > 400


def test_source_package_with_another_hash_is_refused_by_pip_itself(tmp_path, monkeypatch):
    """pip runs the set-up script of what it downloads: our own check would come too late."""
    other = dataclasses.replace(assets.VADER, sha256="0" * 64)
    refuse(r"vaderSentiment==3\.3\.2: cannot fetch with pip \(.*DO NOT MATCH THE HASHES", fetch, other, tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    refuse(r"cannot fetch with pip .*by hand into", load_task, MOVIE, "embedded", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_metrics_by_hand():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 1])
    chosen = np.array([1, 1, 0, 1, 1, 0, 0, 0])  # 3 true positives, 1 false one, 2 true negatives, 2 false ones
    outputs = np.stack([-chosen, chosen], axis=1)
    mcc = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert compute(TASKS["cola"], outputs, labels) == pytest.approx({"matthews": mcc, "score": mcc}, abs=1e-12)
    f1, accuracy = 2 * 3 / (2 * 3 + 1 + 2), 5 / 8
    both = {"f1": f1, "accuracy": accuracy, "score": (f1 + accuracy) / 2}
    assert compute(TASKS["mrpc"], outputs, labels) == pytest.approx(both, abs=1e-12)
    assert compute(TASKS["qqp"], outputs, labels) == pytest.approx(both, abs=1e-12)
    three = compute(TASKS["mnli"], np.array([[0, 1, 2], [3, 1, 2], [0, 4, 2]]), np.array([2, 1, 1]))
    assert three == pytest.approx({"accuracy": 2 / 3, "score": 2 / 3}, abs=1e-12)


def test_correlations_by_hand():
    """Pearson from its sums; Spearman = Pearson of the ranks, ties sharing their mean rank."""
    labels, outputs = np.array([1.0, 2.0, 2.0, 5.0, 0.0]), np.array([0.1, 0.4, 0.3, 3.0, 0.2])

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    ranks = pearson(np.array([2, 3.5, 3.5, 5, 1]), np.array([1, 4, 3, 5, 2]))
    found = compute(TASKS["stsb"], outputs[:, None], labels)
    linear = pearson(labels, outputs)
    assert found == pytest.approx({"pearson": linear, "spearman": ranks, "score": (linear + ranks) / 2}, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_metrics_of_useless_outputs_are_zero():
    """A collapsed or diverged model must not stop a grid, nor win it."""
    labels = np.array([0.0, 1.0, 4.0])
    for outputs in (np.full((3, 1), 2.5), np.full((3, 1), np.nan)):
        assert set(compute(TASKS["stsb"], outputs, labels).values()) == {0.0}
    nowhere = compute(TASKS["mrpc"], np.array([[1.0, 0.0]] * 3), np.array([1, 1, 1]))
    assert nowhere == {"f1": 0.0, "accuracy": 0.0, "score": 0.0}
    assert find_task("cola").result_names == ("matthews",)
    assert compute(TASKS["cola"], np.array([[1.0, 0.0]] * 3), np.array([1, 0, 1]))["score"] == 0.0
