"""Task `embedding`: one text per block, whatever a text is; and the same blocks however they were prepared."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest

from homodistil.config.schema import DataConfig
from homodistil.data.prepare import document_table
from homodistil.data.prepare.corpus import prepare_corpus, prepare_share
from homodistil.data.prepare.packing import BlockFile, Rows
from homodistil.data.prepare.text_packing import TextPacker
from homodistil.data.prepare.texts import TextRule, sentences, text_rule
from homodistil.data.task import TASKS, Frame, settle_task
from homodistil.errors import UserError

PAD, CLS, SEP = 0, 101, 102
WORDS = "The whale, unbelievably große swims past Nantucket's islands again".split()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(0)

    def sentence() -> str:
        return "It " + " ".join(rng.choices(WORDS, k=rng.choice([1, 4, 20]))).lower() + rng.choice([".", "!", "?"])

    return [f"Number {i}. " + " ".join(sentence() for _ in range(rng.choice([1, 3, 30]))) for i in range(40)]


@pytest.fixture
def source(documents, tmp_path) -> str:
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(document, encoding="utf-8")
    return str(tmp_path / "texts")


def config_of(source: str, cache, **fields) -> DataConfig:
    usual = {"task": "embedding", "heldout_fraction": 0.3, "prompt": "none"}
    return DataConfig(sources=[source], cache_dir=str(cache), **usual | fields)


def texts_of(document: str, unit: str, tokenizer, body: int) -> list[list[int]]:
    """What a document's texts are, one by one."""
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (document, *sentences(document))]
    if unit == "document":
        return [ids[0][:body]]
    if unit == "sentence":
        return [part[:body] for part in ids[1:]]
    num = -(-len(ids[0]) // body)
    return [ids[0][len(ids[0]) * i // num : len(ids[0]) * (i + 1) // num] for i in range(num)]


@pytest.mark.parametrize("unit", ["document", "passage", "sentence"])
@pytest.mark.parametrize("prompt", ["none", "query: "])
def test_every_text_has_a_block_of_its_own(tokenizer, documents, source, tmp_path, unit, prompt):
    corpus = prepare_corpus(config_of(source, tmp_path / "c", texts=unit, seq_len=16, prompt=prompt), tokenizer)
    before = tokenizer("" if prompt == "none" else prompt, add_special_tokens=False)["input_ids"]
    sides = [[], []]
    for rows, blocks in zip((corpus.train, corpus.heldout), sides, strict=True):
        for block in rows[range(len(rows))].tolist():
            size = block.index(SEP)
            assert block[0] == CLS and set(block[size + 1 :]) <= {PAD} and block[1 : 1 + len(before)] == before
            blocks.append(block[1 + len(before) : size])
    expected = [texts_of(document, unit, tokenizer, 14 - len(before)) for document in documents]
    for blocks in sides:  # whole documents in order, each on one side
        chosen = [texts for texts in expected if texts[0] in blocks]
        assert blocks == [text for texts in chosen for text in texts]
    assert sum(map(len, sides)) == sum(map(len, expected)) and len(sides[1]) > 0


def hashes(cache) -> dict[str, str]:
    (folder,) = (path for path in (cache / "corpora").iterdir() if path.is_dir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("unit", ["passage", "sentence"])
def test_blocks_do_not_depend_on_shards_tasks_and_reading(tokenizer, source, tmp_path, monkeypatch, unit):
    fields = {"texts": unit, "seq_len": 16, "weights": [1.5]}
    prepare_corpus(config_of(source, tmp_path / "1", **fields), tokenizer)
    monkeypatch.setattr(document_table, "ROW_TOKENS", 1 << 10)  # several reads for a shard, and no document is as long
    small = config_of(source, tmp_path / "2", shard_bytes=500, **fields)
    assert isinstance(prepare_share(small, tokenizer, 1, 2), str)
    prepare_share(small, tokenizer, 0, 2)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


def test_passages_hold_every_token_of_documents_longer_than_a_row(tokenizer, documents, source, tmp_path, monkeypatch):
    monkeypatch.setattr(document_table, "ROW_TOKENS", 37)
    corpus = prepare_corpus(config_of(source, tmp_path / "c", texts="passage", seq_len=12), tokenizer)
    kept = [rows[range(len(rows))].ravel() for rows in (corpus.train, corpus.heldout)]
    tokens = sum(int((~np.isin(ids, (PAD, CLS, SEP))).sum()) for ids in kept)
    assert tokens == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents)


def test_texts_are_part_of_the_name_for_this_task_alone(tokenizer, source, tmp_path):
    def name(**fields) -> str:
        return prepare_corpus(config_of(source, tmp_path / "c", seq_len=16, **fields), tokenizer).fingerprint

    names = {name(texts=unit, prompt=prompt) for unit in ("passage", "sentence") for prompt in ("none", "a: ")}
    assert len(names) == 4 and name(texts="sentence", prompt="a:") in names  # white space behind it changes nothing
    others = {name(task=task, texts=unit, prompt="x") for task in ("mlm", "none") for unit in ("passage", "sentence")}
    assert len(others) == 1 and not others & names


def test_a_prompt_has_to_leave_space(tokenizer):
    config = DataConfig(task="embedding", seq_len=6, prompt="one two three four")
    with pytest.raises(UserError, match="data.prompt: 'one two three four' has 4 tokens, which leaves no space"):
        text_rule(config, tokenizer.backend_tokenizer, num_framing=2)
    assert len(text_rule(replace(config, seq_len=7), tokenizer.backend_tokenizer, num_framing=2).prompt) == 4


def test_a_prompt_and_a_text_are_tokenised_as_one(tmp_path):
    """Tokenizers of bytes take white space to the next word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["query: Text and Text, query: text"] * 9, trainers.BpeTrainer(vocab_size=300))
    rule = text_rule(DataConfig(seq_len=64, prompt="query: "), tokenizer, 2)
    (text,) = rule.parts("Text and", is_first=True)
    assert [*rule.prompt, *tokenizer.encode(text).ids] == tokenizer.encode("query: Text and").ids
    assert rule.lead == " " and list(rule.parts("Text", is_first=False)) == ["Text"]


def test_sentences_by_their_rule():
    text = 'He came. "Did he?" Yes! Mr. Smith and J. Doe, i.e. both, paid 3.5 dollars.\nThen\nmore... '
    text += "Now\n\n A title \n\nend"
    assert sentences(text) == [
        "He came.",
        '"Did he?"',
        "Yes!",
        "Mr. Smith and J. Doe, i.e. both, paid 3.5 dollars.",
        "Then\nmore...",
        "Now",
        "A title",
        "end",
    ]
    assert sentences("今日は。元気？はい") == ["今日は。", "元気？", "はい"]
    assert sentences(" \n ") == []


def test_long_documents_come_in_rows(tmp_path):
    """A document in two rows is one text of task document, and passages of either row."""
    frame, values = Frame(first=1, last=2, between=2, pad=0), np.arange(10, 21)
    rows = [Rows(np.array([0]), np.array([7]), values[:7]), Rows(np.array([0, 3]), np.array([2, 2]), values[7:])]
    expected = {
        "document": [[10, 11, 12, 13], [19, 20]],
        "passage": [[10, 11, 12], [13, 14, 15, 16], [17, 18], [19, 20]],
    }
    for unit, texts in expected.items():
        packer = TextPacker(frame, 6, TextRule(unit))
        out = BlockFile(tmp_path / unit, len(texts), 6, np.dtype(np.uint16))
        for part in rows:
            packer.add(part, out)
        packer.close(out)
        out.close()
        blocks = np.load(tmp_path / unit).tolist()
        assert blocks == [([1, *text, 2] + [0] * 6)[:6] for text in texts]
    assert TextPacker(frame, 6, TextRule("passage")).num_blocks(np.array([9, 2]), np.array([1, 1])) == 4
    assert TextPacker(frame, 6, TextRule("sentence"), 0.5).num_blocks(np.array([9, 2]), np.array([3, 2])) == 2


def test_a_teacher_with_modules_is_an_embedder():
    for has_head in (True, False):
        settle_task(data := DataConfig(), "mlm", "teacher", has_head, is_embedder=True)
        assert data.task == "embedding" and TASKS[data.task].has_single_texts
    settle_task(data := DataConfig(), "causal", "teacher", is_embedder=True)
    assert data.task == "causal"
    settle_task(data := DataConfig(task="none"), "mlm", "teacher", is_embedder=True)
    assert data.task == "none"
