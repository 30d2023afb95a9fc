"""What is left out and how often what stays comes: boilerplate, near-duplicates, weights."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from homodistil.config.rules import check
from homodistil.config.schema import DataConfig, RunConfig
from homodistil.data.prepare import near_duplicates
from homodistil.data.prepare.corpus import prepare_corpus, prepare_share
from homodistil.errors import UserError

STOP_WORDS = "the be to of and that have with".split()


def prose(seed: int, count: int = 300) -> str:
    """Words that Gopher's rules take for prose, all different enough."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(count)]
    words[:: count // 20] = [rng.choice(STOP_WORDS) for _ in words[:: count // 20]]
    return " ".join(words)


def edited(text: str, share: float, seed: int) -> str:
    words, rng = text.split(), random.Random(seed)
    for index in rng.sample(range(len(words)), int(share * len(words))):
        words[index] = "changed"
    return " ".join(words)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config_of(tmp_path: Path, *sources: str, **fields) -> DataConfig:
    return DataConfig(sources=list(sources), cache_dir=str(tmp_path / "cache"), **fields)


def manifest(tmp_path: Path, fingerprint: str) -> dict:
    return json.loads((tmp_path / "cache" / "corpora" / fingerprint / "manifest.json").read_text())


def test_boilerplate_goes_and_is_counted(tokenizer, tmp_path):
    menu = "\n".join(["Home | About | Contact | Login"] * 60)
    short = "Click here to read more."
    texts = [prose(0), menu, prose(1), short, prose(2), prose(3), f"{prose(9, 80)}\n" * 6]
    config = config_of(tmp_path, write(tmp_path / "a.jsonl", texts), boilerplate_filter="gopher")
    corpus = prepare_corpus(config, tokenizer)
    (source,) = manifest(tmp_path, corpus.fingerprint)["sources"]
    assert source["train"]["documents"] + source["heldout"]["documents"] == 4
    assert source["dropped"]["gopher_quality"]["documents"] == 2
    assert source["dropped"]["gopher_quality"]["bytes"] == len(menu) + len(short)
    assert source["dropped"]["gopher_repetition"]["documents"] == 1
    assert source["dropped"]["gopher_repetition"]["tokens"] > 400
    assert "datatrove" in manifest(tmp_path, corpus.fingerprint)["versions"]
    plain = prepare_corpus(config_of(tmp_path, *config.sources), tokenizer)
    assert plain.fingerprint != corpus.fingerprint and len(plain.train) > len(corpus.train)


def test_of_near_duplicates_the_first_stays(tokenizer, tmp_path, monkeypatch):
    """Copies with 1 % of their words changed go, those with 20 % stay; across shards and sources, in corpus order."""
    originals = [prose(seed, 600) for seed in range(12)]
    near = [edited(text, 0.01, 100 + seed) for seed, text in enumerate(originals[:5])]
    far = [edited(text, 0.2, 200 + seed) for seed, text in enumerate(originals[5:8])]
    first, second = write(tmp_path / "a.jsonl", originals), write(tmp_path / "b.jsonl", [*near, *far, originals[11]])
    config = config_of(tmp_path, first, second, near_duplicates="minhash", shard_bytes=10_000)
    corpus = prepare_corpus(config, tokenizer)
    a, b = manifest(tmp_path, corpus.fingerprint)["sources"]
    assert not a["dropped"] and b["dropped"]["near_duplicate"]["documents"] == 6
    assert b["train"]["documents"] + b["heldout"]["documents"] == 3
    found = {path.name: path.read_bytes() for path in (tmp_path / "cache/corpora" / corpus.fingerprint).iterdir()}
    monkeypatch.setattr(near_duplicates, "_SLICE_DOCUMENTS", 3)  # many passes
    monkeypatch.setattr(near_duplicates, "_BATCH", 2)
    other = config_of(tmp_path / "other", first, second, near_duplicates="minhash", shard_bytes=10_000, workers=2)
    for task in (1, 0):
        again = prepare_share(other, tokenizer, task, 2)
    folder = tmp_path / "other" / "cache" / "corpora" / again.fingerprint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == found


def test_filters_that_keep_nothing(tokenizer, tmp_path):
    config = config_of(tmp_path, write(tmp_path / "a.jsonl", ["too short", "as well"]), boilerplate_filter="gopher")
    with pytest.raises(UserError, match=r"the filters keep none of the 2 documents of '.*a.jsonl'; remove it, or set"):
        prepare_corpus(config, tokenizer)


@pytest.mark.parametrize(
    ("field", "value", "package"),
    [("boilerplate_filter", "gopher", "datatrove"), ("near_duplicates", "minhash", "datasketch")],
)
def test_missing_library(tokenizer, tmp_path, monkeypatch, field, value, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    config = config_of(tmp_path, write(tmp_path / "a.jsonl", ["one", "two"]), **{field: value})
    with pytest.raises(UserError, match=rf"data.{field}: needs {package} .*; pip install {package}.*, or set"):
        prepare_corpus(config, tokenizer)


def blocks_of(rows) -> Counter:
    return Counter(map(bytes, rows[range(len(rows))]))


def test_weights_repeat_and_thin_training_blocks(tokenizer, tmp_path):
    sources = [write(tmp_path / f"{i}.jsonl", [prose(50 * i + j, 900) for j in range(20)]) for i in range(3)]
    alone = [prepare_corpus(config_of(tmp_path, source), tokenizer) for source in sources]
    plain = prepare_corpus(config_of(tmp_path, *sources), tokenizer)
    corpus = prepare_corpus(config_of(tmp_path, *sources, weights=[2.0, 0.5, 1.3]), tokenizer)
    assert corpus.fingerprint != plain.fingerprint
    once, half, more = (blocks_of(corpus_.train) for corpus_ in alone)
    found = blocks_of(corpus.train)
    assert all(found[block] == 2 for block in once)
    assert sum(found[block] for block in half) == sum(half.values()) // 2 and set(found.values()) == {1, 2}
    assert sum(found[block] for block in more) == int(sum(more.values()) * 1.3) and all(found[b] for b in more)
    by_source = manifest(tmp_path, corpus.fingerprint)["splits"]["train"]["blocks_by_source"]
    assert sum(by_source) == len(corpus.train) and by_source[0] == 2 * len(alone[0].train)
    np.testing.assert_array_equal(corpus.heldout[range(len(corpus.heldout))], plain.heldout[range(len(plain.heldout))])
    assert prepare_corpus(config_of(tmp_path, *sources, weights=[1, 1, 1]), tokenizer).fingerprint == plain.fingerprint


def test_weights_that_do_not_fit():
    for weights, pattern in (([1.0], r"data.weights: found 1 for 2 data.sources"), ([1, 0], r"data.weights: found 0")):
        config = RunConfig()
        config.data.sources, config.data.weights = ["a.txt", "b.txt"], weights
        with pytest.raises(UserError, match=pattern):
            check(config)
