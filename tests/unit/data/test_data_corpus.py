"""Corpus: packing against a naive reference, split by document, cache, many processes, a kill."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fork_server import Job

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import prepare_corpus
from homodistil.data.prepare.packing import split
from homodistil.errors import UserError

PAD, CLS, SEP, MASK = 0, 101, 102, 103
WORDS = "The whale, unbelievably große – swims: past Nantucket's islands again! naïve 1851 tokenization".split()
PREPARE = """
import sys, json
from transformers import AutoTokenizer
from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import prepare_corpus
teacher, cache, source = sys.argv[1:]
corpus = prepare_corpus(DataConfig(sources=[source], cache_dir=cache), AutoTokenizer.from_pretrained(teacher))
print(corpus.fingerprint, len(corpus.train), len(corpus.heldout))
"""


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of very different lengths; one is far longer than a piece of the tokeniser's input."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 3, 40, 300]) for _ in range(count)]
    lengths[count // 2] = 9000
    return [f"Document {i} {seed}. " + " ".join(rng.choices(WORDS, k=n)) for i, n in enumerate(lengths)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def prepare(tokenizer, tmp_path, *sources, **fields):
    return prepare_corpus(
        DataConfig(sources=list(map(str, sources)), cache_dir=str(tmp_path / "cache"), **fields), tokenizer
    )


def streams(rows) -> list[list[int]]:
    """Documents of a split, read back from its blocks; checks the frame of every block."""
    blocks = rows[range(len(rows))]
    assert (blocks[:, 0] == CLS).all() and (blocks[:-1, -1] == SEP).all()
    last = [token for token in blocks[-1].tolist() if token != PAD]
    assert blocks[-1].tolist() == last + [PAD] * (blocks.shape[1] - len(last)) and last[-1] == SEP and len(last) > 2
    stream = [*blocks[:-1, 1:-1].ravel().tolist(), *last[1:-1]]
    return [list(group) for is_sep, group in itertools.groupby(stream, lambda t: t == SEP) if not is_sep]


@pytest.mark.parametrize("seq_len", [7, 64, 512])
def test_packing_equals_a_naive_reference(tokenizer, tmp_path, seq_len):
    texts = make_texts(31)
    corpus = prepare(
        tokenizer, tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), seq_len=seq_len, heldout_fraction=0.3
    )
    reference = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    train, heldout = streams(corpus.train), streams(corpus.heldout)
    assert train == [tokens for tokens in reference if tokens in train], "whole documents, in order"
    assert heldout == [tokens for tokens in reference if tokens in heldout]
    assert sorted(train + heldout) == sorted(reference), "every document on exactly one side"
    assert len(heldout) == round(0.3 * 31)
    for rows, documents in ((corpus.train, train), (corpus.heldout, heldout)):
        tokens = sum(map(len, documents))
        assert len(rows) == math.ceil((tokens + len(documents) - 1) / (seq_len - 2))
        assert f"{len(documents)} documents, {tokens:,} tokens, {len(rows):,} blocks of {seq_len}" in corpus.description


def test_result_does_not_depend_on_processes(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(700))
    alone, many = prepare(tokenizer, tmp_path / "1", source), prepare(tokenizer, tmp_path / "3", source, workers=3)
    assert alone.fingerprint == many.fingerprint
    np.testing.assert_array_equal(alone.train[range(len(alone.train))], many.train[range(len(many.train))])
    np.testing.assert_array_equal(alone.heldout[range(len(alone.heldout))], many.heldout[range(len(many.heldout))])


def test_kinds_of_file_agree(tokenizer, tmp_path):
    texts = make_texts(12)
    write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"id": range(13), "text": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n \n\n", encoding="utf-8")
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text("\ufeff" + text, encoding="utf-8")
    (folder / ".hidden.txt").write_bytes(b"\0")
    (folder / "README.md").write_text("not text of the corpus")
    sources = [tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "a.txt", tmp_path / "folder"]
    found = [
        prepare(tokenizer, tmp_path, s, text_documents="paragraph" if s.suffix == ".txt" else "file") for s in sources
    ]
    assert len({c.fingerprint for c in found}) == 4
    documents = [sorted(streams(c.train) + streams(c.heldout)) for c in found]
    assert documents[0] == documents[1] == documents[2] == documents[3]


def test_text_that_spells_special_tokens_stays_ordinary(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the [MASK] token and [SEP] or [PAD]", "another [CLS] document"])
    for workers in (0, 2):
        corpus = prepare(tokenizer, tmp_path / str(workers), source, workers=workers)
        for rows in (corpus.train, corpus.heldout):
            blocks = rows[range(len(rows))]
            assert not (blocks == MASK).any() and (blocks[:, 1:] != CLS).all()
            assert len(streams(rows)) == 1


def test_equal_documents_do_not_leak(tokenizer, tmp_path):
    texts = make_texts(40) * 2
    corpus = prepare(tokenizer, tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.21)
    train, heldout = ({tuple(d) for d in streams(rows)} for rows in (corpus.train, corpus.heldout))
    assert not train & heldout and len(train) + len(heldout) == 40


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_split_has_every_source_on_both_sides(sizes, fraction, seed):
    source_of = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(source_of), dtype=np.uint64)
    if len(source_of) < 2:
        with pytest.raises(UserError, match=r"found 1 document\(s\), at least 2 are needed"):
            split(hashes, source_of, fraction)
        return
    heldout = split(hashes, source_of, fraction)
    for source, size in enumerate(sizes):
        if size > 1:
            assert heldout[source_of == source].sum() == min(max(round(fraction * size), 1), size - 1)
    assert 0 < heldout.sum() < len(heldout)
    shuffled = np.random.default_rng(seed).permutation(len(hashes))
    np.testing.assert_array_equal(split(hashes[shuffled], source_of[shuffled], fraction), heldout[shuffled])


def test_sources_of_one_document_are_split_together(tokenizer, tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, file in enumerate(files):
        file.write_text(f"only document {i}")
    corpus = prepare(tokenizer, tmp_path, *files)
    assert len(streams(corpus.train)) == 3 and len(streams(corpus.heldout)) == 1


def test_fingerprint_follows_content_and_settings(tokenizer, tmp_path):
    texts = make_texts(6)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    first = prepare(tokenizer, tmp_path, source)
    os.utime(source, (1, 1))
    tokenizer("leaves padding and truncation switched on", padding="max_length", truncation=True, max_length=9)
    assert prepare(tokenizer, tmp_path, source).fingerprint == first.fingerprint
    others = [{"seq_len": 65}, {"heldout_fraction": 0.5}, {"text_documents": "paragraph"}]
    found = {prepare(tokenizer, tmp_path, source, **fields).fingerprint for fields in others}
    write_jsonl(tmp_path / "a.jsonl", [texts[0].swapcase(), *texts[1:]])
    found |= {first.fingerprint, prepare(tokenizer, tmp_path, source).fingerprint}
    assert len(found) == 5


def test_second_call_is_fast(tokenizer, cache_dir, capfd):
    config = DataConfig(cache_dir=str(cache_dir))
    first = prepare_corpus(config, tokenizer)
    capfd.readouterr()
    start = time.perf_counter()
    second = prepare_corpus(config, tokenizer)
    # Measured 0.13 s; a rebuild takes 20 s and more.
    assert time.perf_counter() - start < 5.0
    assert second.fingerprint == first.fingerprint and second.description == first.description
    assert capfd.readouterr().err.startswith("data.sources: embedded = embedded:wikipedia, embedded:")
    assert len(first.train) > 10_000 and len(first.heldout) > 500
    assert first.train[[0, -1]].max() < len(tokenizer)


def start(server, tokenizer, cache: Path, source: str, num_processes: int = 1) -> Job:
    arguments = [tokenizer.name_or_path, str(cache), source]
    return server.start_program(PREPARE, arguments, num_processes, env={"RANK": "1"})


@pytest.mark.process
def test_ranks_prepare_once_and_agree(server, tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    job = start(server, tokenizer, tmp_path / "cache", source, num_processes=3)
    assert job.wait(timeout_s=120) == [0, 0, 0], job.output()
    results = {job.output(rank).splitlines()[-1] for rank in range(3)}
    assert len(results) == 1 and results.pop().count(" ") == 2, job.output()
    assert "tokenising" not in job.output(), "only rank 0 shows progress"
    assert len([p for p in (tmp_path / "cache" / "corpora").iterdir() if p.is_dir()]) == 1


@pytest.mark.process
def test_kill_leaves_no_half_corpus(server, tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    cache = tmp_path / "cache"
    corpora = cache / "corpora"
    job, deadline = start(server, tokenizer, cache, source), time.monotonic() + 60
    while not list(cache.glob("parts/*/.*.tmp/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.005)
    job.kill()
    assert job.wait(timeout_s=60) == [-signal.SIGKILL], job.output()
    assert [p.name[0] for p in corpora.iterdir()] == [".", "."], "killed in the middle: lock and scratch only"
    after, clean = prepare(tokenizer, tmp_path, source), prepare(tokenizer, tmp_path / "other", source)
    np.testing.assert_array_equal(after.train[range(len(after.train))], clean.train[range(len(clean.train))])
    assert sorted(p.name for p in (corpora / after.fingerprint).iterdir()) == [
        "corpus.json",
        "heldout.npy",
        "manifest.json",
        "train.npy",
    ]
    assert not list(corpora.glob(".*.tmp")) and not list(cache.glob("parts/[!.]*")), "no scratch is left"


@pytest.mark.process
def test_prepare_data_script_leaves_a_corpus_that_training_finds(server, tmp_path, cache_dir, tokenizer):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Document {i} of a small folder. " * 30)
    script = Path(__file__).parents[3] / "launcher" / "prepare_data.py"
    arguments = [f"data.sources=[{tmp_path}]", "data.seq_len=16", f"data.cache_dir={cache_dir}"]
    output = server.run(script, arguments, num_ranks=1, timeout_s=120)
    config = DataConfig(sources=[str(tmp_path)], seq_len=16, cache_dir=str(cache_dir))
    corpus = prepare_corpus(config, tokenizer)
    assert corpus.fingerprint in output and corpus.description in output
    shutil.rmtree(cache_dir / "corpora" / corpus.fingerprint)
