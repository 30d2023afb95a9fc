"""Sources: every mistake in `data.sources` and in the files is one clear line; hub names and rows."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import check_sources, prepare_corpus
from homodistil.data.sources import hub
from homodistil.errors import UserError


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def prepare(tokenizer, tmp_path, *sources, **fields):
    config = DataConfig(sources=list(map(str, sources)), cache_dir=str(tmp_path / "cache"), **fields)
    return prepare_corpus(config, tokenizer)


def refuse(tokenizer, tmp_path, pattern: str, *sources, **fields) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        prepare(tokenizer, tmp_path, *sources, **fields)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("corpora/[!.]*")), "no corpus is left behind"


def test_missing_and_unknown_sources(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(tokenizer, tmp_path, r"data.sources: 'no/such.txt' does not exist; give a file or folder", "no/such.txt")
    refuse(tokenizer, tmp_path, r"'embeded' does not exist \(did you mean 'embedded'\?\)", "embeded")
    refuse(tokenizer, tmp_path, r"found 'embedded:bibel', packaged are .*mean 'embedded:bible'", "embedded:bibel")
    (tmp_path / "a.csv").write_text("text\n")
    refuse(
        tokenizer,
        tmp_path,
        r"'.*a.csv' has suffix '.csv', allowed: .txt, .jsonl, .parquet",
        tmp_path / "a.csv",
    )
    (tmp_path / "empty").mkdir()
    refuse(
        tokenizer,
        tmp_path,
        r"folder '.*empty' holds no .txt, .jsonl, .parquet, .* file",
        tmp_path / "empty",
    )
    with pytest.raises(UserError, match="does not exist"):
        check_sources(DataConfig(sources=["embedded", "/nowhere/at/all"], cache_dir=str(tmp_path / "untouched")))
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_no_text(tokenizer, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    refuse(tokenizer, tmp_path, r"data.sources: '.*a.txt' holds no text", tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    refuse(tokenizer, tmp_path, r"data.sources: '.*a.jsonl' holds no text", tmp_path / "a.jsonl")


def test_one_document_is_too_few(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A single document.\n\nWith two paragraphs.")
    refuse(tokenizer, tmp_path, r"found 1 document.*at least 2.*text_documents=paragraph", tmp_path / "a.txt")
    assert len(prepare(tokenizer, tmp_path, tmp_path / "a.txt", text_documents="paragraph").heldout) == 1


def test_documents_without_tokens_do_not_count(tokenizer, tmp_path):
    # Control characters only: text to Python, nothing to the tokeniser.
    source = write_jsonl(tmp_path / "a.jsonl", ["\u200e\u0001", "one document"])
    refuse(tokenizer, tmp_path, r"found 1 document\(s\), at least 2", source)


def test_binary_files(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"fine line\nthen \0 NUL")
    refuse(tokenizer, tmp_path, r"'.*a.txt' is not text: a NUL byte at offset 15 \(line 2\); convert", file)
    file.write_bytes("größe\n".encode() + "größe".encode("latin-1"))
    refuse(tokenizer, tmp_path, r"'.*a.txt' is not text: byte 0xf6, not UTF-8 at offset 10 \(line \d\); convert", file)
    file.write_bytes(gzip.compress(b"text"))
    refuse(tokenizer, tmp_path, r"'.*a.txt' is not text: ", file)
    (tmp_path / "a.parquet").write_bytes(b"PAR0")
    refuse(tokenizer, tmp_path, r"'.*a.parquet' is not a readable parquet file", tmp_path / "a.parquet")


def test_bad_records(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    for line, pattern in (
        ("{'text': 1}", r"data.sources: .*a.jsonl:2: not valid JSON \(.*column 2\)"),
        ("[1]", r"data.sources: .*a.jsonl:2: found list, expected an object a line"),
        ('{"text": 3}', r"data.text_column: .*a.jsonl:2: 'text' holds int, expected a string"),
        ('{"txt": "a", "id": 1}', r"data.text_column: .*a.jsonl:2 has no column 'text' .*'txt'.*; found: txt, id"),
    ):
        file.write_text('{"text": "fine"}\n' + line + "\n")
        refuse(tokenizer, tmp_path, pattern, file)
    pq.write_table(pa.table({"body": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    refuse(tokenizer, tmp_path, r"a.parquet has no column 'text'; found: body, n", tmp_path / "a.parquet")
    pattern = r"data.text_column: .*a.parquet: 'n' holds int64, expected strings"
    refuse(tokenizer, tmp_path, pattern, tmp_path / "a.parquet", text_column="n")
    assert len(prepare(tokenizer, tmp_path, tmp_path / "a.parquet", text_column="body").train) == 1


def test_unreadable_file(tokenizer):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "a.txt").write_text("secret")
        (folder / "a.txt").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # root reads everything
        try:
            refuse(tokenizer, folder, r"cannot read '.*a.txt' \(Permission denied\); check", folder / "a.txt")
        finally:
            if is_root:
                os.seteuid(0)


def test_tokenizer_limits(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    refuse(tokenizer, tmp_path, r"data.seq_len: found 513, the teacher takes at most 512", source, seq_len=513)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "texts").mkdir()
    for name in ("wikipedia", "bookcorpus", "Skylion007/openwebtext", "wikimedia/wikipedia:20231101.simple"):
        assert hub.is_hub_name(name)
    for name in ("my/texts", "my/file.txt", "./owner/name", "/abs/path", "name", "a/b/c", "../x/y", "embedded:bible"):
        assert not hub.is_hub_name(name)


def test_hub_data_set_that_cannot_be_loaded(tokenizer, tmp_path, monkeypatch):
    # The libraries' own offline switch: fails as an unreachable hub does, without their 20 s of retries.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    pattern = (
        r"data.sources: cannot load hub data set 'no-such-owner-0/no-such-set' \(\w+: .*\); check the name and the"
    )
    refuse(tokenizer, tmp_path, pattern, "no-such-owner-0/no-such-set")
