"""Ground-truth labels: from a column to the row of each block, and what is refused; corpora without any as before."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from homodistil.config.schema import DataConfig
from homodistil.data.loader import BatchLoader, EvenlySpread, fixed_batches
from homodistil.data.prepare.corpus import Corpus, check_tokenizer, prepare_corpus, prepare_share
from homodistil.data.prepare.integrity import content_damage, structure_damage
from homodistil.data.prepare.labels import LabelRule
from homodistil.data.prepare.texts import RULE_VERSION, TextRule
from homodistil.data.sources.sources import check_sources, open_sources
from homodistil.data.task import TASKS
from homodistil.errors import UserError

NAMES = ("contradiction", "entailment", "neutral")
ONE = LabelRule("label", "single_label_classification", NAMES)
EACH = LabelRule("label", "multi_label_classification", NAMES)
SCORE = LabelRule("label", "regression", ("LABEL_0",))
MISSING = (None, -100, -100.0, math.nan)
SEQ_LEN = 12
PAIR = {"pair_columns": ["a", "b"]}


@pytest.mark.parametrize(
    ("rule", "value", "row"),
    [
        (ONE, "entailment", [1]),
        (ONE, 2, [2]),
        (ONE, 0.0, [0]),
        (ONE, True, [1]),
        (EACH, ["neutral", "contradiction"], [1, 0, 1]),
        (EACH, "entailment", [0, 1, 0]),
        (EACH, [0, 1, 0.5], [0, 1, 0.5]),
        (EACH, [True, False, True], [1, 0, 1]),
        (EACH, [], [0, 0, 0]),
        (SCORE, 3.5, [3.5]),
        (SCORE, [-2], [-2]),
        (LabelRule("label", "multi_label_classification", ("LABEL_0",)), 1, [1]),
        (LabelRule("label", "regression", NAMES), [1, -2, 0.5], [1, -2, 0.5]),
        *((rule, value, [math.nan] * rule.width) for rule in (ONE, EACH, SCORE) for value in MISSING),
    ],
)
def test_what_a_label_becomes(rule, value, row):
    np.testing.assert_equal(rule.numbers(value, lambda: ""), row)


@pytest.mark.parametrize(
    ("rule", "value", "said"),
    [
        (ONE, "Entailment", "holds 'Entailment' (did you mean 'entailment'?), allowed are the teacher's labels ("),
        (
            ONE,
            3,
            "holds 3, allowed are the teacher's labels (contradiction, entailment, neutral) and their numbers 0 .. 2",
        ),
        (ONE, -1, "holds -1, allowed"),
        (ONE, 1.5, "holds 1.5, allowed"),
        (ONE, math.inf, "holds inf, allowed"),
        (ONE, 10**400, "holds 1000"),
        (ONE, "1", "holds '1', allowed"),
        (ONE, [1], "holds [1], allowed"),
        (ONE, "x" * 999, f"holds '{'x' * 79}..., allowed"),
        (
            EACH,
            ["joy"],
            "holds ['joy'], allowed are a list of those of the teacher's labels that hold (contradiction, ",
        ),
        (EACH, [0, 1], "holds [0, 1], allowed"),
        (EACH, [0, 2, 0], "holds [0, 2, 0], allowed"),
        (EACH, [0, "neutral", 1], "holds [0, 'neutral', 1], allowed"),
        (EACH, 1, "holds 1, allowed"),
        (SCORE, "good", "holds 'good', allowed are 1 number, as the teacher's labels are scores; write null (or -100)"),
        (SCORE, [1, 2], "holds [1, 2], allowed"),
        (SCORE, math.inf, "holds inf, allowed"),
    ],
)
def test_what_is_no_label(rule, value, said):
    with pytest.raises(UserError, match=re.escape(f"data.label_column: file:7: 'label' {said}")) as caught:
        rule.numbers(value, lambda: "file:7")
    assert "\n" not in str(caught.value)


def write(folder: Path, count: int = 40, kind: str = "jsonl") -> str:
    """Line i is about number i, which its label says as well, but for every fifth, which has none."""
    folder.mkdir(parents=True)
    lines = [
        {"text": f"whale number {i}", "other": f"and {i}", "label": None if i % 5 == 0 else float(i)}
        for i in range(count)
    ]
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "a.parquet", row_group_size=7)
    return str(folder)


def config_of(cache: Path, *sources: str, **fields) -> DataConfig:
    usual = {"task": "scores", "heldout_fraction": 0.3, "prompt": "none", "texts": "document", "label_column": "label"}
    return DataConfig(sources=list(sources), cache_dir=str(cache), seq_len=SEQ_LEN, **usual | fields)


def check_rows(corpus: Corpus, tokenizer) -> int:
    """Every block has the label of its own text. Returns the number of blocks."""
    total = 0
    for blocks, labels in ((corpus.train, corpus.labels.train), (corpus.heldout, corpus.labels.heldout)):
        assert len(blocks) == len(labels) > 0
        for block, (label,) in zip(blocks[range(len(blocks))], labels[range(len(labels))], strict=True):
            (number, *_) = re.findall(r"\d+", tokenizer.decode(block))
            assert math.isnan(label) if int(number) % 5 == 0 else label == int(number), number
        total += len(blocks)
    return total


@pytest.mark.parametrize("pair_columns", [[], ["text", "other"]])
def test_every_block_has_the_label_of_its_text(tokenizer, tmp_path, pair_columns):
    """However sources are weighted, divided and stored."""
    lines, table = write(tmp_path / "lines"), write(tmp_path / "table", kind="parquet")
    (tmp_path / "lines" / "b.jsonl").write_text('{"text": " ", "other": "1", "label": "no label at all"}')
    config = config_of(tmp_path / "1", lines, pair_columns=pair_columns)
    whole = prepare_corpus(config, tokenizer, labels=SCORE)
    assert check_rows(whole, tokenizer) == 40
    assert structure_damage(whole.train.path.parent) is None is content_damage(whole.train.path.parent)
    again = Corpus.named(whole.names())
    assert np.array_equal(again.labels.train[[3, 1]], whole.labels.train[[3, 1]], equal_nan=True)
    small = config_of(tmp_path / "2", table, pair_columns=pair_columns, shard_bytes=300)
    assert isinstance(prepare_share(small, tokenizer, 1, 2, SCORE), str)
    corpus = prepare_share(small, tokenizer, 0, 2, SCORE)
    for split in ("train", "heldout"):
        for name in (f"{split}.npy", f"{split}_labels.npy"):
            assert (corpus.train.path.parent / name).read_bytes() == (whole.train.path.parent / name).read_bytes()
    weighted = config_of(tmp_path / "3", lines, table, pair_columns=pair_columns, weights=[2.5, 0.5])
    assert check_rows(prepare_corpus(weighted, tokenizer, labels=SCORE), tokenizer) == 28 * 2.5 + 28 // 2 + 2 * 12


def test_batches_bring_the_labels_of_their_texts(tokenizer, tmp_path):
    config = config_of(tmp_path / "c", write(tmp_path / "lines"))
    corpus = prepare_corpus(config, tokenizer, labels=SCORE)
    loader = BatchLoader(corpus.train, tokenizer, config, 0, 8, 4, 0, 1, labels=corpus.labels.train)
    batches = [batch for consumed in (0, 8, 24) for batch in loader.micro_batches(consumed)]  # 24: a second epoch
    few = (EvenlySpread(rows, 7) for rows in (corpus.heldout, corpus.labels.heldout))
    rows, labels = few
    batches += fixed_batches(rows, tokenizer, config, 0, 3, 0, 1, labels=labels)
    for batch in batches:
        numbers = [int(re.findall(r"\d+", tokenizer.decode(ids))[0]) for ids in batch.input_ids]
        expected = [[math.nan if number % 5 == 0 else number] for number in numbers]
        np.testing.assert_equal(batch.labels.numpy(), np.array(expected, dtype=np.float32))
        assert batch.counts.labelled == sum(number % 5 != 0 for number in numbers)
    assert loader.micro_batches(0)[0].to("cpu").labels.shape == (4, 1)


def test_a_corpus_without_labels_is_named_and_made_as_before(tokenizer, tmp_path):
    """Whatever columns there are: its files, its manifest and its fingerprint, which names the folder in the cache."""
    config = config_of(tmp_path / "c", write(tmp_path / "lines"), label_column=None)
    plain = prepare_corpus(config, tokenizer)
    backend = check_tokenizer(config, tokenizer).to_str().encode()
    before = {
        "version": 1,
        "sources": [open_sources(config)[0].fingerprint],
        "text_documents": "file",
        "text_column": "text",
        "tokenizer": hashlib.sha256(backend).hexdigest(),
        "special_ids": TASKS["scores"].fingerprint(tokenizer),
        "seq_len": SEQ_LEN,
        "heldout_fraction": 0.3,
        "texts": [RULE_VERSION, *TextRule("document")],
    }
    digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:32]
    assert plain.fingerprint == digest and plain.labels is None
    folder = plain.train.path.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "corpus.json",
        "heldout.npy",
        "manifest.json",
        "train.npy",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["sha256"]) == ["heldout.npy", "train.npy"] and "label_column" not in manifest["settings"]
    assert sorted(manifest["shards"][0]["files"]) == ["documents.npy", "tokens.bin"]
    labelled = prepare_corpus(config_of(tmp_path / "c", *config.sources), tokenizer, labels=SCORE)
    assert labelled.train.path.read_bytes() == plain.train.path.read_bytes()
    names = [prepare_corpus(config_of(tmp_path / "c", *config.sources), tokenizer, labels=rule).fingerprint for rule in
             (SCORE, SCORE._replace(names=("LABEL_1",)), None)]  # fmt: skip
    assert len({*names}) == 3 and names[0] == labelled.fingerprint and names[2] == plain.fingerprint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_labels_are_noticed_and_made_again(tokenizer, tmp_path, capfd):
    config = config_of(tmp_path / "c", write(tmp_path / "lines"))
    folder = prepare_corpus(config, tokenizer, labels=SCORE).train.path.parent
    for damage, said in (
        (flip, "train_labels.npy has another sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "train_labels.npy"),
        (Path.unlink, "train_labels.npy: No such file"),
    ):
        damage(folder / "train_labels.npy")
        assert said in content_damage(folder)
        check_rows(prepare_corpus(config, tokenizer, labels=SCORE), tokenizer)
        assert "is damaged (train_labels.npy" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "line", "fields", "said"),
    [
        ("jsonl", {"text": "a", "label": "joy"}, {}, "data.label_column: {file}:3: 'label' holds 'joy', allowed are 1"),
        ("parquet", {"text": "a", "label": "joy"}, {}, "data.label_column: {file}: row 2: 'label' holds 'joy'"),
        ("jsonl", {"text": "a", "lable": 1}, {}, "data.label_column: {file}:1 has no column 'label' (did you"),
        ("parquet", {"text": "a", "lable": 1}, {}, "data.label_column: {file} has no column 'label' (did"),
        ("jsonl", {"label": 1}, {}, "data.text_column: {file}:1 has no column 'text'"),
        ("jsonl", {"a": 1, "b": "", "label": 1}, PAIR, "data.pair_columns: {file}:1: 'a' holds int, expected"),
    ],
)  # fmt: skip
def test_lines_without_a_label_that_can_be_read(tokenizer, tmp_path, kind, line, fields, said):
    """The first of the two lines has none by its own account, where there is such a column."""
    file, empty = tmp_path / f"p.{kind}", line | ({"label": None} if "label" in line else {})
    if kind == "jsonl":
        file.write_text(f"{json.dumps(empty)}\n\n{json.dumps(line)}")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([empty, line]), file, row_group_size=1)
    with pytest.raises(UserError, match=re.escape(said.format(file=file))) as caught:
        prepare_corpus(config_of(tmp_path / "c", str(file), **fields), tokenizer, labels=SCORE)
    assert "\n" not in str(caught.value)


def test_files_without_columns_hold_no_labels(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for source, kind in ((str(tmp_path / "a.txt"), ".txt"), ("embedded:bible", "no file")):
        said = f"data.label_column: found label, but {source!r} is {kind}; labels are read from .jsonl and .parquet"
        with pytest.raises(UserError, match=re.escape(said)):
            check_sources(config_of(tmp_path, source))
