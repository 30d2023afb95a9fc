"""Texts, pairs and labels of hub data sets, and what is refused of them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import prepare_corpus
from homodistil.data.prepare.labels import LabelRule
from homodistil.data.prepare.token_labels import TokenLabelRule
from homodistil.data.sources import hub
from homodistil.data.sources.documents import start_of
from homodistil.data.sources.labelled import read_labelled
from homodistil.data.sources.sources import open_sources
from homodistil.errors import UserError


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """The library takes a folder owner/name for a hub data set of that name: the same code path without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("homodistil.data.sources.sources.is_hub_name", lambda name: name == "owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    return tmp_path / "owner" / "name"


def test_hub_rows_are_read(hub_folder):
    table = pa.table({"text": ["first", "", None, "second"], "id": range(4)})
    pq.write_table(table, hub_folder / "train.parquet")
    opened = hub.open_hub("owner/name", ["text"])
    assert list(opened.texts("text")) == ["first", "second"]
    assert opened.fingerprint == hub.open_hub("owner/name", ["text"]).fingerprint
    with pytest.raises(UserError, match=r"data.text_column: 'owner/name' has no column 'body'; found: text, id"):
        hub.open_hub("owner/name", ["body"])
    with pytest.raises(UserError, match=r"data.text_column: 'owner/name': 'id' holds Value.'int64'., expected str"):
        hub.open_hub("owner/name", ["id"])
    with pytest.raises(UserError, match=r"data.label_column: 'owner/name' has no column 'label'; found: text, id"):
        hub.open_hub("owner/name", ["text"], "label")


def test_hub_pairs_have_labels_by_the_names_of_the_data_set(hub_folder, tmp_path, tokenizer):
    """Of which the numbers are in another order than the teacher's, and -1 is none; words have labels alike."""
    features = datasets.Features(
        query=datasets.Value("string"),
        passage=datasets.Value("string"),
        label=datasets.ClassLabel(names=["neutral", "entailment", "contradiction"]),
    )
    labels = [number % 3 if number % 4 else -1 for number in range(30)]
    rows = {"query": [f"query {i}" for i in range(30)], "passage": [f"passage {i}" for i in range(30)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hub_folder / "train.parquet")
    config = DataConfig(sources=["owner/name"], cache_dir=str(tmp_path / "cache"), seq_len=16, heldout_fraction=0.3)
    config.task, config.prompt, config.label_column = "scores", "none", "label"
    config.pair_columns = ["query", "passage"]
    names = ("contradiction", "entailment", "neutral")
    rule = LabelRule("label", "single_label_classification", names)
    corpus = prepare_corpus(config, tokenizer, labels=rule)
    assert len(corpus.train) + len(corpus.heldout) == 30
    for block, (label,) in zip(corpus.train[range(9)], corpus.labels.train[range(9)], strict=True):
        number, again = re.findall(r"\d+", tokenizer.decode(block))
        expected = {0: 2, 1: 1, 2: 0, -1: math.nan}[labels[int(number)]]
        assert number == again and (label == expected or (math.isnan(expected) and math.isnan(label)))
    other = rule._replace(names=("LABEL_0", "LABEL_1", "LABEL_2"))
    (source,) = open_sources(config)
    read = [other.read(label) for _, label in read_labelled(source, start_of(source, 0))]
    np.testing.assert_equal(read, [[label if label >= 0 else math.nan] for label in labels])


def test_hub_words_have_labels(hub_folder):
    tags = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), tags=datasets.List(datasets.ClassLabel(names=["B-PER", "O"]))
    )
    rows = {"tokens": [["Anna", "lives"], ["so", "it", "is"]], "tags": [[0, 1], [1, -1, 1]]}
    datasets.Dataset.from_dict(rows, features=tags).to_parquet(hub_folder / "train.parquet")
    config = DataConfig(sources=["owner/name"], text_column="tokens", label_column="tags", task="token_scores")
    (source,) = open_sources(config)
    rule = TokenLabelRule(LabelRule("tags", "single_label_classification", ("O", "B-PER")), 16)
    documents = list(read_labelled(source, start_of(source, 0)))
    assert [list(pieces) for pieces, _ in documents] == [["Anna lives"], ["so it is"]]
    np.testing.assert_equal([rule.read(label).numbers.tolist() for _, label in documents], [[1, 0], [0, math.nan, 0]])
    bad = documents[1][1]._replace(value=[0, 7, 1])
    with pytest.raises(UserError, match=r"data.label_column: owner/name: row 2, word 2: 'tags' holds 7, allowed"):
        rule.read(bad)
