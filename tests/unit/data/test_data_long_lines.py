"""Lines of any length in bounded memory: in parts where documents may be cut, refused where they may not."""

from __future__ import annotations

import io
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homodistil.data.prepare import shard_plan
from homodistil.data.sources import documents
from homodistil.data.sources.documents import Span, read
from homodistil.data.sources.sources import Source
from homodistil.data.sources.text_files import TextFile
from homodistil.errors import UserError


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(documents, "_PART_BYTES", 32)
    monkeypatch.setattr(shard_plan, "_PART_BYTES", 32)


def _source(path, text_documents: str = "file") -> Source:
    return Source(name="a", text_column="text", text_documents=text_documents, files=[TextFile(str(path))])


def _read(path, text_documents: str = "file") -> list[str]:
    return ["".join(pieces) for pieces in read(_source(path, text_documents), Span(0, 0, -1, 0))]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab äß漢\U0001f40b\n\t", max_size=400))
def test_parts_put_together_are_the_line_and_tear_no_word(text):
    content, size = text.encode(), documents._PART_BYTES
    documents._PART_BYTES = 32
    try:
        parts = list(documents._parts(io.BufferedReader(io.BytesIO(content))))
    finally:
        documents._PART_BYTES = size
    assert b"".join(parts) == content and all(0 < len(part) <= 32 for part in parts)
    assert "".join(part.decode() for part in parts) == text  # no character is torn
    for before, after in zip(parts, parts[1:], strict=False):
        is_torn = not (before.endswith(b"\n") or after[:1] in b" \t\r")
        assert not is_torn or not any(space in before[16:] for space in b" \t")


@pytest.mark.parametrize("text_documents", ["file", "paragraph"])
def test_documents_do_not_depend_on_the_parts(tmp_path, short_parts, text_documents):
    path = tmp_path / "a.txt"
    long = "the quick brown fox jumps over " * 40
    path.write_text(f"{long}\nshort\n\n{long}{long}\n \nlast")
    expected = [path.read_text()] if text_documents == "file" else [f"{long}\nshort\n", f"{long}{long}\n", "last"]
    assert _read(path, text_documents) == expected
    shards = shard_plan.make_plan([_source(path, text_documents)], 100, "").shards
    spans = [span for shard in shards for span in shard.spans]
    found = ["".join(pieces) for span in spans for pieces in read(_source(path, text_documents), span)]
    assert found == expected and (text_documents == "file" or len(spans) > 1)


def test_a_line_and_a_paragraph_that_must_be_whole_have_a_limit(tmp_path, short_parts, monkeypatch):
    monkeypatch.setattr(documents, "_WHOLE_CHARS", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fox"}\n{"text": "' + "fox " * 300_000 + '"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: a line of more than 1 M characters; split"):
        _read(path)
    path = tmp_path / "b.txt"
    path.write_text("fox\n" * 300_000)
    with pytest.raises(UserError, match=r"b.txt' has a paragraph of more than 1 M characters"):
        _read(path, "paragraph")


def test_a_line_without_end_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PART_BYTES", 1 << 16)
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox " * 400_000)  # 8 MB
    tracemalloc.start()
    try:
        (document,) = read(_source(path), Span(0, 0, -1, 0))
        assert sum(map(len, document)) == 8_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
