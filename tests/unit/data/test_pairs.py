"""Pairs of texts in blocks: the same ids and types as the tokenizer's own, however they were prepared."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from homodistil.config.schema import DataConfig
from homodistil.data.pairs import pair_frame
from homodistil.data.prepare.corpus import Corpus, prepare_corpus, prepare_share
from homodistil.data.prepare.pairs import truncated_lengths
from homodistil.data.sources.sources import check_sources
from homodistil.data.task import TASKS
from homodistil.errors import UserError

WORDS = "The whale, unbelievably große swims past Nantucket's islands [SEP] again".split()
SEQ_LEN = 16


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerBase:
    """RoBERTa's kind: bytes, two separators between texts, no types."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special.values()))
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", model_input_names=inputs, **special
    )


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Both texts short, one long, both long; one is nothing but what a tokenizer leaves out."""
    draw = random.Random(0)
    counts = [1, 2, 5, 6, 9, 30]
    made = [tuple(" ".join(draw.choices(WORDS, k=draw.choice(counts))) for _ in range(2)) for _ in range(60)]
    return [*made, ("\x00\x01", "a whale"), ("a whale", "​")]


def write_lines(folder: Path, pairs: list[tuple[str, str]]) -> str:
    folder.mkdir()
    lines = [json.dumps({"query": a, "id": i, "passage": b}) for i, (a, b) in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return str(folder)


def config_of(source: str, cache: Path, **fields) -> DataConfig:
    usual = {"task": "scores", "heldout_fraction": 0.3, "prompt": "none", "pair_columns": ["query", "passage"]}
    return DataConfig(sources=[source], cache_dir=str(cache), seq_len=SEQ_LEN, **usual | fields)


def all_blocks(corpus: Corpus) -> np.ndarray:
    return np.concatenate([rows[range(len(rows))] for rows in (corpus.train, corpus.heldout)])


def encoded(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str], truncation: str) -> dict[str, list[int]]:
    """By the tokenizer itself, with what is written like a special token as ordinary text."""
    options = {"padding": "max_length", "max_length": SEQ_LEN, "split_special_tokens": True}
    return tokenizer(*pair, truncation=truncation, return_token_type_ids=True, **options)


@pytest.mark.parametrize("truncation", ["longest_first", "only_second"])
@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_a_block_is_what_the_tokenizer_makes_of_a_pair(tokenizer, byte_level, pairs, tmp_path, kind, truncation):
    tokenizer = tokenizer if kind == "wordpiece" else byte_level
    if truncation == "only_second":  # the tokenizer itself fails where the first text leaves the second no space
        sizes = [len(tokenizer(a, add_special_tokens=False, split_special_tokens=True)["input_ids"]) for a, _ in pairs]
        pairs = [pair for pair, size in zip(pairs, sizes, strict=True) if size < SEQ_LEN - 4]
    source = write_lines(tmp_path / "text", pairs)
    config = config_of(source, tmp_path / "c", truncation=truncation)
    corpus = prepare_corpus(config, tokenizer)
    expected = [encoded(tokenizer, pair, truncation) for pair in pairs]
    blocks = all_blocks(corpus)
    assert sorted(blocks.tolist()) == sorted(one["input_ids"] for one in expected) and len(corpus.heldout) > 4
    batch = TASKS["scores"].batch_maker(tokenizer, config, seed=0).without_targets(blocks)
    types_of = {tuple(one["input_ids"]): one["token_type_ids"] for one in expected}
    types = [types_of[tuple(block)] for block in blocks.tolist()]
    assert torch.equal(batch.input_ids, torch.from_numpy(blocks)) and len(batch.target_ids) == 0
    if kind == "byte_level":
        assert batch.token_types is None and not np.any(types)
    else:
        assert batch.token_types.tolist() == types and 0 < np.mean(types) < 1
        assert all(torch.equal(a, b) for a, b in zip(batch.to("cpu").tensors, batch.tensors, strict=True))


def test_the_first_text_may_leave_the_second_no_space():
    """Of pairs of any lengths: none is longer than allowed, and no token goes that there is space for."""
    first, second = (part.ravel() for part in np.meshgrid(np.arange(9), np.arange(9)))
    for most in (2, 5, 6):
        for truncation in ("longest_first", "only_second"):
            a, b = truncated_lengths(first, second, most, truncation)
            assert np.array_equal(a + b, np.minimum(first + second, most))
            assert (a <= first).all() and (b <= second).all()
            has_space = first < most
            if truncation == "only_second":
                assert np.array_equal(a[has_space], first[has_space]) and (b[has_space & (second > 0)] > 0).all()
            else:  # the longer one loses first
                is_cut = (a < first) | (b < second)
                assert (np.abs(a - b)[is_cut] <= np.maximum(np.abs(first - second)[is_cut], 1)).all()


def test_blocks_do_not_depend_on_shards_tasks_and_kinds_of_files(tokenizer, pairs, tmp_path):
    source = write_lines(tmp_path / "text", pairs)
    (tmp_path / "table").mkdir()
    columns = dict(zip(("query", "passage"), map(list, zip(*pairs, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table" / "p.parquet", row_group_size=7)
    prepare_corpus(config_of(source, tmp_path / "1", weights=[1.5]), tokenizer)
    small = config_of(source, tmp_path / "2", shard_bytes=500, weights=[1.5])
    assert isinstance(prepare_share(small, tokenizer, 1, 2), str)
    prepare_share(small, tokenizer, 0, 2)
    prepare_corpus(config_of(str(tmp_path / "table"), tmp_path / "3", shard_bytes=500, weights=[1.5]), tokenizer)
    first, *rest = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.glob("corpora/*/*.npy")}
        for cache in (tmp_path / name for name in "123")
    )
    assert len(first) == 2 and rest == [first, first]


def test_what_a_corpus_of_pairs_is_named_by(tokenizer, pairs, tmp_path):
    source = write_lines(tmp_path / "text", pairs)

    def name(**fields) -> str:
        return prepare_corpus(config_of(source, tmp_path / "c", **fields), tokenizer).fingerprint

    names = {name(), name(truncation="only_second"), name(pair_columns=["passage", "query"])}
    assert len(names) == 3 and name(texts="sentence") in names
    single = {"pair_columns": [], "text_column": "query", "texts": "document"}
    assert name(**single) not in names
    assert name(**single) == name(**single, task="embedding") == name(**single, truncation="only_second")


def test_pairs_with_an_empty_text_are_left_out(tokenizer, tmp_path):
    source = write_lines(tmp_path / "text", [("a", "b"), ("", "c"), ("d", "  "), ("e", "f"), ("g", "h")])
    assert len(all_blocks(prepare_corpus(config_of(source, tmp_path / "c"), tokenizer))) == 3


@pytest.mark.parametrize(
    ("lines", "fields", "said"),
    [
        (['{"query": "a"}'], {}, "data.pair_columns: {file}:1 has no column 'passage'; found: query"),
        (['{"query": "a", "passage": 3}'], {}, "data.pair_columns: {file}:1: 'passage' holds int, expected a string"),
        (
            ['{"query": "a", "passage": "b"}'],
            {"pair_columns": []},
            "data.text_column: {file}:1 has no column 'text'; found: query, passage; for pairs of a cross-encoder set "
            "data.pair_columns=[query,passage]",
        ),
        (
            ['{"query": "a", "passage": "b"}'],
            {"seq_len": 4},
            "data.seq_len: found 4, of which the frame of a pair takes 3",
        ),
    ],
)
def test_lines_that_are_no_pairs(tokenizer, tmp_path, lines, fields, said):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(lines))
    config = config_of(str(file), tmp_path / "c")
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=re.escape(said.format(file=file))) as caught:
        prepare_corpus(config, tokenizer)
    assert "\n" not in str(caught.value)


def test_files_without_columns_hold_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for source, kind in ((str(tmp_path / "a.txt"), ".txt"), ("embedded:bible", "no file")):
        said = f"data.pair_columns: found query,passage, but {source!r} is {kind}; pairs are read from .jsonl and"
        with pytest.raises(UserError, match=re.escape(said)):
            check_sources(config_of(source, tmp_path))


def test_a_frame_that_is_not_supported(byte_level):
    backend = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    with pytest.raises(UserError, match="data.pair_columns: the teacher's tokenizer frames a pair as"):
        pair_frame(tokenizer)
