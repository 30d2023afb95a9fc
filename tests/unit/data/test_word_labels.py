"""Labels of words: at the first token of each, for every kind of tokenizer, however they are stored; and bad input."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.loader import BatchLoader
from homodistil.data.prepare.corpus import Corpus, prepare_corpus, prepare_share
from homodistil.data.prepare.integrity import content_damage
from homodistil.data.prepare.labels import LabelRule
from homodistil.data.prepare.token_labels import TokenLabelRule
from homodistil.data.sources.labelled import RawLabel
from homodistil.errors import UserError

NAMES = ("O", "B-PER", "I-PER", "B-LOC")
SEQ_LEN = 16
RULE = TokenLabelRule(LabelRule("tags", "single_label_classification", NAMES), SEQ_LEN)
WORDS = "Anna unbelievably lives in Straßburg , near große 東京 can't U.S. x".split()


def rows_of(count: int = 40) -> list[tuple[list[str], list]]:
    """Words of texts from one word to more than a block, and their labels: names, numbers and none."""
    draw = random.Random(0)
    texts = [draw.choices(WORDS, k=draw.choice([1, 2, 5, 9, 20])) for _ in range(count)]
    return [(words, [draw.choice([*NAMES, 0, 3, None, -100]) for _ in words]) for words in texts]


def number(label: str | int | None) -> float:
    if label is None or label == -100:
        return math.nan
    return float(NAMES.index(label) if isinstance(label, str) else label)


def naive(tokenizer: Tokenizer, words: list[str], labels: list, lead: str = "") -> np.ndarray:
    """Word by word, by the tokenizers library's own map from characters to tokens."""
    encoding, start = tokenizer.encode(lead + " ".join(words), add_special_tokens=False), len(lead)
    row = np.full(len(encoding.ids), np.nan)
    for word, label in zip(words, labels, strict=True):
        if (token := encoding.char_to_token(start)) is not None:
            row[token] = number(label)
        start += len(word) + 1
    return row


def other_tokenizers() -> list[Tokenizer]:
    """Of bytes, with spaces in front of words inside their tokens' offsets and without, and of unigrams."""
    made = []
    for model, splitter in (
        (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)),
        (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (models.Unigram(), pre_tokenizers.Metaspace()),
    ):
        backend = Tokenizer(model)
        backend.pre_tokenizer = splitter
        options = {"vocab_size": 320, "show_progress": False}
        is_bytes = isinstance(model, models.BPE)
        trainer = trainers.BpeTrainer(**options) if is_bytes else trainers.UnigramTrainer(unk_token="?", **options)
        backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
        made.append(backend)
    return made


@pytest.mark.parametrize("lead", ["", "find: "])
def test_the_first_token_of_a_word_has_its_label(tokenizer, lead):
    for backend in (tokenizer.backend_tokenizer, *other_tokenizers()):
        for words, labels in rows_of():
            read = RULE.read(RawLabel(labels, lambda: "", words))
            encoding = backend.encode(lead + " ".join(words), add_special_tokens=False)
            row = read.of_tokens(encoding.offsets, len(lead))
            np.testing.assert_equal(row.astype(np.float64), naive(backend, words, labels, lead))


def test_it_is_what_the_example_scripts_of_transformers_do(tokenizer):
    for words, labels in rows_of():
        encoding = tokenizer(words, is_split_into_words=True, add_special_tokens=False)
        owners = encoding.word_ids()
        first = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
        expected = np.full(len(owners), np.nan)
        expected[first] = [number(labels[owners[i]]) for i in first]
        assert encoding["input_ids"] == tokenizer.encode(" ".join(words), add_special_tokens=False)
        np.testing.assert_equal(naive(tokenizer.backend_tokenizer, words, labels), expected)


def write(folder: Path, kind: str = "jsonl") -> str:
    """`rows_of` as a file; the labels of a parquet file are numbers, as a column has one type."""
    folder.mkdir(parents=True)
    rows = [{"tokens": words, "tags": labels} for words, labels in rows_of()]
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder)
    for row in rows:
        row["tags"] = [None if math.isnan(number(label)) else int(number(label)) for label in row["tags"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
    return str(folder)


def config_of(source: str, cache: Path, **fields) -> DataConfig:
    usual = {"task": "token_scores", "heldout_fraction": 0.3, "prompt": "none", "texts": "document"}
    columns = {"text_column": "tokens", "label_column": "tags"}
    return DataConfig(sources=[source], cache_dir=str(cache), seq_len=SEQ_LEN, **usual | columns | fields)


def check_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> int:
    """Every block has the labels of its own text, as far as this goes. Returns the number of blocks."""
    before = [tokenizer.cls_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    by_block = {}
    for words, labels in rows_of():
        ids = tokenizer.encode(" ".join(words), add_special_tokens=False)[: SEQ_LEN - 1 - len(before)]
        row = np.full(SEQ_LEN, np.nan)
        row[len(before) : len(before) + len(ids)] = naive(tokenizer.backend_tokenizer, words, labels)[: len(ids)]
        block = [*before, *ids, tokenizer.sep_token_id]
        by_block.setdefault((*block, *[tokenizer.pad_token_id] * (SEQ_LEN - len(block))), []).append(row)
    total = 0
    for blocks, labels in ((corpus.train, corpus.labels.train), (corpus.heldout, corpus.labels.heldout)):
        assert len(blocks) == len(labels) > 0
        for block, row in zip(blocks[range(len(blocks))], labels[range(len(labels))], strict=True):
            assert any(np.array_equal(row, expected, equal_nan=True) for expected in by_block[tuple(block)])
        total += len(blocks)
    return total


@pytest.mark.parametrize("prompt", ["none", "find: "])
def test_every_block_has_the_labels_of_its_tokens(tokenizer, tmp_path, prompt):
    """However texts are stored and divided."""
    said = "" if prompt == "none" else prompt
    config = config_of(write(tmp_path / "lines"), tmp_path / "1", prompt=prompt)
    whole = prepare_corpus(config, tokenizer, labels=RULE)
    assert check_rows(whole, tokenizer, said) == 40 and content_damage(whole.train.path.parent) is None
    config = config_of(write(tmp_path / "table", "parquet"), tmp_path / "2", prompt=prompt, shard_bytes=200)
    for task in range(3):
        shared = prepare_share(config, tokenizer, task, 3, RULE)
    assert check_rows(shared, tokenizer, said) == 40
    without = prepare_corpus(config_of(config.sources[0], tmp_path / "3", label_column=None), tokenizer)
    assert without.labels is None and without.fingerprint != shared.fingerprint


def test_batches_bring_one_label_for_each_row_of_logits(tokenizer, tmp_path):
    config = config_of(write(tmp_path / "lines"), tmp_path / "cache")
    corpus = prepare_corpus(config, tokenizer, labels=RULE)
    rows = {tuple(corpus.train[[i]][0]): corpus.labels.train[[i]][0] for i in range(len(corpus.train))}
    loader = BatchLoader(corpus.train, tokenizer, config, 0, 8, 4, 0, 1, labels=corpus.labels.train)
    for batch in loader.micro_batches(0):
        expected = np.concatenate([rows[tuple(block)] for block in batch.input_ids.numpy()])[batch.target_index]
        np.testing.assert_equal(batch.labels.numpy(), expected[:, None])
        assert batch.counts.labelled == (~np.isnan(expected)).sum() > 0


@pytest.mark.parametrize(
    ("words", "labels", "said"),
    [
        (["a", "b"], ["O"], "found 2 words and 1 labels in 'tags', expected a list of words and one label for each"),
        (["a", "b"], "O", "found 2 words and a str in 'tags', expected a list"),
        (None, ["O"], "found a text in one piece and 1 labels in 'tags', expected a list of words"),
        (["a", "b"], ["O", "B-ORG"], "word 2: 'tags' holds 'B-ORG'"),
        (["a", "b"], [4, "O"], "word 1: 'tags' holds 4, allowed are the teacher's labels (O, B-PER, I-PER, B-LOC)"),
        (["a"], [["O"]], "word 1: 'tags' holds ['O']"),
    ],
)
def test_what_are_no_labels(words, labels, said):
    with pytest.raises(UserError, match=r"data.label_column: a.jsonl:7.*" + re.escape(said)) as caught:
        RULE.read(RawLabel(labels, lambda: "a.jsonl:7", words))
    assert "\n" not in str(caught.value)


def test_a_text_without_any_label(tokenizer):
    assert np.isnan(RULE.read(RawLabel(None, lambda: "", ["a", "b"])).numbers).all()
    assert not RULE.has_label(RawLabel([None, -100], lambda: "", ["a", "b"]))
    assert RULE.has_label(RawLabel([None, "O"], lambda: "", ["a", "b"]))


def test_words_that_are_no_strings_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["a", 7], "tags": [0, 0]}')
    with pytest.raises(UserError, match=r"data.text_column: .*a.jsonl:1: 'tokens' holds list, expected a string or a"):
        prepare_corpus(config_of(str(tmp_path), tmp_path / "cache"), tokenizer, labels=RULE)
