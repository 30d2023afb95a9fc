"""Reads the documents of a span of a source. A document is an iterator of pieces of text, to bound the memory.

A span is a range between two document boundaries (data/prepare/shard_plan.py): bytes of a file of lines, row groups of
a parquet file, or rows of a hub data set.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from homodistil.data.sources.columns import PARQUET_BATCH_ROWS, joined, no_column, parquet_columns, parquet_texts
from homodistil.data.sources.sources import Source
from homodistil.data.sources.text_files import TextFile
from homodistil.errors import UserError

TEXT_COLUMN = "data.text_column"
_PIECE_CHARS = 16_384  # maximum length of a piece, which is tokenised at once
_PART_BYTES = 16 << 20  # of a line in memory at once, if it may be cut
_WHOLE_CHARS = 256 << 20  # maximum length of a line or paragraph that must be in memory as a whole
_SURROGATE = re.compile("[\ud800-\udfff]")

Piece = str


class Span(NamedTuple):
    """The position of some documents of a source."""

    file: int
    """Index into the files of the source; -1: rows of its hub data set."""
    start: int
    """First byte, row group or row."""
    end: int
    """One past the last byte, row group or row; -1: to the end of the file."""
    num_bytes: int
    """Approximate size of the text."""


def start_of(source: Source, file: int) -> Span:
    """A span with the first documents of a file or of the hub data set of the source, independent of any plan."""
    if source.hub is not None:
        return Span(-1, 0, min(source.hub.num_rows, PARQUET_BATCH_ROWS), 0)
    return Span(file, 0, 1 if source.files[file].kind == ".parquet" else -1, 0)


def read(source: Source, span: Span) -> Iterator[Iterable[Piece]]:
    """Documents of a span in a fixed order. Each document must be consumed before the next one is requested.

    Raises:
        UserError: the text is unreadable, binary or malformed; the message names file and position.
    """
    if source.hub is not None and source.pair_columns is not None:
        return _whole_pairs(source.hub.rows(source.pair_columns, span.start, span.end))
    if source.hub is not None:
        return (cut(text) for text in source.hub.texts(source.text_column, span.start, span.end))
    file = source.files[span.file]
    if source.pair_columns is not None:
        return _pairs(file, source.pair_columns, span)
    if file.kind == ".parquet":
        return (cut(text) for text in parquet_texts(file, source.text_column, range(span.start, span.end)))
    if file.kind == ".jsonl":
        return (cut(text) for text in _json_texts(file, source.text_column, span))
    if file.kind == ".xml":
        return (cut(text) for text in _dump_texts(file))
    if source.text_documents == "paragraph":
        return (cut(text) for text in _paragraphs(file, span))
    return iter([_whole(_lines(file, span))])


def _lines(file: TextFile, span: Span) -> Iterator[str]:
    """Lines of a UTF-8 file with their line ends; long lines come in parts. Raises `UserError` for a binary file."""
    offset = span.start
    with file.reading() as raw:
        if span.start:
            raw.seek(span.start)
        for line in _parts(raw):
            if offset >= span.end >= 0:
                return
            if (position := line.find(b"\0")) >= 0:
                raise _binary(file, offset + position, "a NUL byte")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _binary(file, offset + error.start, f"byte 0x{line[error.start]:02x}, not UTF-8") from None
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(line)


def _parts(raw: BinaryIO) -> Iterator[bytes]:
    """Lines in parts of at most `_PART_BYTES`, cut before white space if there is any, and never inside a character."""
    if not isinstance(raw, io.BufferedIOBase):  # of an object store, whose client reads whole lines only
        yield from raw
        return
    held = b""
    while part := held + raw.readline(_PART_BYTES - len(held)):
        cut = len(part)
        if len(part) >= _PART_BYTES and not part.endswith(b"\n"):
            cut = _cut_of(part)
        yield part[:cut]
        held = part[cut:]


def _cut_of(part: bytes) -> int:
    space = max(part.rfind(kind, len(part) // 2) for kind in (b" ", b"\t", b"\r"))
    if space > 0:
        return space
    cut = len(part) - 1
    while cut > len(part) - 4 and part[cut] & 0xC0 == 0x80:  # this byte is inside a character
        cut -= 1
    return cut


def _binary(file: TextFile, offset: int, reason: str) -> UserError:
    return UserError(
        f"data.sources: {file.location!r} is not text: {reason} at offset {offset}{_line_at(file, offset)}; convert "
        f"the file to UTF-8 or remove it"
    )


def _line_at(file: TextFile, offset: int) -> str:
    if file.is_remote:
        return ""
    number, left = 1, offset
    with file.reading() as raw:
        while left and (content := raw.read(min(left, _PART_BYTES))):
            number, left = number + content.count(b"\n"), left - len(content)
    return f" (line {number})"


def _whole(lines: Iterable[str]) -> Iterator[Piece]:
    held, length = [], 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= _PIECE_CHARS:
            yield from cut("".join(held))
            held, length = [], 0
    yield from cut("".join(held))


def _paragraphs(file: TextFile, span: Span) -> Iterator[str]:
    held: list[str] = []
    length = 0
    for line in _lines(file, span):
        if line.strip() or (held and not held[-1].endswith("\n")):  # or the rest of a long line
            held.append(line)
            length += len(line)
        elif held:
            yield "".join(held)
            held, length = [], 0
        if length > _WHOLE_CHARS:
            raise UserError(
                f"data.text_documents: {file.location!r} has a paragraph of more than {_WHOLE_CHARS >> 20} M "
                f"characters; put blank lines between paragraphs, or set data.text_documents=file"
            )
    if held:
        yield "".join(held)


def _whole_lines(file: TextFile, span: Span) -> Iterator[str]:
    """Lines of the span, each as one string. Raises `UserError` for a line that is too long."""
    held: list[str] = []
    number, length = 1, 0
    for part in _lines(file, span):
        held.append(part)
        length += len(part)
        if length > _WHOLE_CHARS:
            raise UserError(
                f"data.sources: {_place(file, span, number)}: a line of more than {_WHOLE_CHARS >> 20} M characters; "
                f"split its document into several"
            )
        if part.endswith("\n"):
            yield "".join(held)
            held, length, number = [], 0, number + 1
    if held:
        yield "".join(held)


def cut(text: str) -> Iterator[Piece]:
    """Pieces of at most `_PIECE_CHARS`, cut before white space, so that words and tokens stay the same."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        window = text[start : start + _PIECE_CHARS]
        spaces = re.search(r"\s\S*\Z", window[1:])
        end = start + 1 + spaces.start() if spaces else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _pairs(file: TextFile, columns: tuple[str, str], span: Span) -> Iterator[Iterable[Piece]]:
    """Pairs, each whole in two pieces. A pair with a text that is missing or empty is left out."""
    if file.kind == ".parquet":
        both = parquet_columns(file, columns, range(span.start, span.end))
    else:
        both = (
            [json_string(record, column, "data.pair_columns", where, line) for column in columns]
            for record, where, line in json_records(file, columns, span)
        )
    return _whole_pairs(both)


def _whole_pairs(pairs: Iterable[list[str | None]]) -> Iterator[Iterable[Piece]]:
    return (pair for pair in pairs if all(text and text.strip() for text in pair))


def _json_texts(file: TextFile, column: str, span: Span) -> Iterator[str]:
    for record, where, line in json_records(file, [column], span):
        if text := json_string(record, column, TEXT_COLUMN, where, line):
            yield text


def json_records(
    file: TextFile, columns: Sequence[str], span: Span
) -> Iterator[tuple[dict[str, Any], Callable[[], str], str]]:
    """Objects that have all of `columns`, where each stands (to be called for messages alone), and its line."""
    for number, line in enumerate(_whole_lines(file, span), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"data.sources: {_place(file, span, number)}: not valid JSON ({_reason(error)}); write one object "
                f"a line"
            ) from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"data.sources: {_place(file, span, number)}: found {kind}, expected an object a line")
        for column in columns:
            if column not in record:
                raise no_column(_place(file, span, number), column, record, len(columns) > 1)
        yield record, functools.partial(_place, file, span, number), line


def json_string(record: dict[str, Any], column: str, field: str, where: Callable[[], str], line: str) -> str | None:
    """The text of a record, which may also be a list of words, unless it is one of a pair. `line`: the record's."""
    may_be_words = field == TEXT_COLUMN
    text = joined(record[column]) if may_be_words and _are_words(record[column]) else record[column]
    if not isinstance(text, str | None):
        expected = "a string or a list of words" if may_be_words else "a string"
        raise UserError(f"{field}: {where()}: {column!r} holds {type(text).__name__}, expected {expected}")
    if "\\u" in line and (half := _SURROGATE.search(text or "")):
        raise UserError(
            f"data.sources: {where()}: {column!r} holds \\u{ord(half.group()):x}, half of a "
            f"pair and no character; remove it, or write the character itself"
        )
    return text


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"


def _place(file: TextFile, span: Span, number: int) -> str:
    """File and line for messages. The lines before the span are counted only here, because this reads the file."""
    before = Span(span.file, 0, span.start, 0)
    num_before = sum(line.endswith("\n") for line in _lines(file, before)) if span.start else 0
    return f"{file.location}:{number + num_before}"


def _dump_texts(file: TextFile) -> Iterator[str]:
    # Imported here, because the parser of wiki markup is needed only for dumps.
    from xml.etree.ElementTree import ParseError

    from homodistil.data.sources.embedded_text import articles

    try:
        with file.reading() as dump:
            yield from (document.text for document in articles(dump))
    except UserError:
        raise
    except (ParseError, ValueError, LookupError, RecursionError) as error:  # the last three: wrong encoding or too deep
        raise UserError(
            f"data.sources: {file.location!r} is not a whole Wikipedia dump ({error}); fetch it again"
        ) from None
