"""Files that are packed, lie behind a URL, or are Wikipedia dumps: the same documents as plain local ones."""

from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import json
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import prepare_corpus
from homodistil.data.sources.text_files import TextFile
from homodistil.errors import UserError

TEXTS = [f"Document {i} of some that lie elsewhere. " * (3 + i) for i in range(30)]
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>{}</mediawiki>"""
PAGE = "<page><title>{0}</title><ns>{1}</ns>{2}<revision><text>{3}</text></revision></page>"
PROSE = "'''Whales''' are [[mammal|mammals]] that live in the {{convert|5|km}} deep sea and number {} today, they say."


def prepare(tokenizer, tmp_path: Path, *sources, **fields):
    return prepare_corpus(DataConfig(sources=list(map(str, sources)), cache_dir=str(tmp_path), **fields), tokenizer)


def content(tmp_path: Path, corpus) -> list[bytes]:
    folder = tmp_path / "corpora" / corpus.fingerprint
    return [(folder / name).read_bytes() for name in ("train.npy", "heldout.npy", "corpus.json")]


@pytest.fixture(scope="module")
def lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def reference(tokenizer, lines, tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("reference")
    (folder / "a.jsonl").write_bytes(lines)
    return content(folder, prepare(tokenizer, folder, folder / "a.jsonl"))


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_packed_files(tokenizer, tmp_path, lines, reference):
    for name, packed in (("a.jsonl.gz", gzip.compress(lines)), ("b.jsonl.bz2", bz2.compress(lines))):
        (tmp_path / name).write_bytes(packed)
        assert content(tmp_path, prepare(tokenizer, tmp_path, tmp_path / name, shard_bytes=1000)) == reference
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    with pytest.raises(UserError, match=r"data.sources: cannot read '.*a.jsonl.gz' \(.*ended before"):
        prepare(tokenizer, tmp_path, tmp_path / "a.jsonl.gz")


def test_object_storage(tokenizer, tmp_path, lines, reference, memory):
    """A folder of several kinds; cut into shards, read by workers, recognised, and noticed when it changes."""
    with memory.open("/bucket/a/1.jsonl", "wb") as file:
        file.write(b"".join(lines.splitlines(keepends=True)[:20]))
    with memory.open("/bucket/a/2.parquet", "wb") as file:
        pq.write_table(pa.table({"text": TEXTS[20:]}), file)
    memory.pipe("/bucket/a/notes.md", b"not text of the corpus")
    for fields in ({}, {"shard_bytes": 3000, "workers": 2}):
        corpus = prepare(tokenizer, tmp_path / str(len(fields)), "memory://bucket/a", **fields)
        assert content(tmp_path / str(len(fields)), corpus) == reference
    assert prepare(tokenizer, tmp_path / "0", "memory://bucket/a").fingerprint == corpus.fingerprint
    memory.pipe("/bucket/a/3.txt", b"one more document")
    assert prepare(tokenizer, tmp_path / "0", "memory://bucket/a").fingerprint != corpus.fingerprint


def test_file_urls_are_paths(tokenizer, tmp_path, lines, reference):
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert content(tmp_path, prepare(tokenizer, tmp_path, f"file://{tmp_path}/a.jsonl")) == reference


@pytest.fixture
def server(tmp_path):
    """A plain web server: no ranges, and an error for what it does not have."""
    pytest.importorskip("aiohttp")
    (tmp_path / "www").mkdir()
    handler = functools.partial(_Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass


def test_web_server_without_ranges(tokenizer, tmp_path, lines, reference, server):
    (tmp_path / "www" / "a.jsonl").write_bytes(lines)
    (tmp_path / "www" / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        corpus = prepare(tokenizer, tmp_path / name, f"{server}/{name}", shard_bytes=1000)
        assert content(tmp_path / name, corpus) == reference
    with pytest.raises(UserError, match=rf"cannot read '{server}/none.jsonl' \(FileNotFoundError: .*check the URL"):
        prepare(tokenizer, tmp_path, f"{server}/none.jsonl")


def test_urls_that_cannot_be_read(tokenizer, tmp_path, memory):
    for url, pattern in (
        ("memory://bucket/none.jsonl", r"cannot read 'memory://bucket/none.jsonl' \(FileNotFoundError: .*check the"),
        ("memory://bucket/empty", r"'memory://bucket/empty' is no .txt, .* file .* and holds none; found 0 other"),
        ("nowhere://bucket/a.txt", r"cannot read 'nowhere://bucket/a.txt' \(ValueError: Protocol not known: nowhere"),
    ):
        with pytest.raises(UserError, match=pattern) as caught:
            prepare(tokenizer, tmp_path, url)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.xml", "enwiki-latest-pages-articles1.xml-p1p41242.bz2"])
def test_wikipedia_dump(tokenizer, tmp_path, name):
    pages = [PAGE.format(f"Whale {i}", 0, "", PROSE.replace("{}", str(i)) + "\n\n* a list item") for i in range(5)]
    pages += [PAGE.format("Talk:Whale", 1, "", PROSE), PAGE.format("Old", 0, '<redirect title="Whale 1"/>', PROSE)]
    dump = DUMP.format("".join(pages)).encode()
    (tmp_path / name).write_bytes(bz2.compress(dump) if name.endswith("bz2") else dump)
    corpus = prepare(tokenizer, tmp_path, tmp_path / name)
    assert corpus.description.startswith("training: 4 documents") and "held out: 1 documents" in corpus.description
    text = tokenizer.decode(corpus.train[0])
    assert "whales are mammals that live in the 5 km deep sea" in text and "[[" not in text and "list item" not in text
    (tmp_path / "torn.xml").write_bytes(dump[:-50])
    with pytest.raises(UserError, match=r"'.*torn.xml' is not a whole Wikipedia dump \(.*\); fetch it again"):
        prepare(tokenizer, tmp_path, tmp_path / "torn.xml")


def test_kinds_of_file():
    for name, kind, suffix in (
        ("a.txt", ".txt", ".txt"),
        ("a.b.jsonl.gz", ".jsonl", ".jsonl.gz"),
        ("s3://b/w.xml-p1p2.bz2", ".xml", ".xml.bz2"),
        ("a.parquet", ".parquet", ".parquet"),
        ("a.parquet.gz", None, ".gz"),
        ("a.md", None, ".md"),
        ("a.gz", None, ".gz"),
    ):
        assert (TextFile(name).kind, TextFile(name).suffix) == (kind, suffix), name
