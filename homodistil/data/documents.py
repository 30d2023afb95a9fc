"""A span of a source -> documents. A document is an iterator of pieces of text, so that a long one is never in memory.

A span is what lies between two document boundaries (plan.py): bytes of a file of lines, row groups of a parquet file,
rows of a hub data set.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from homodistil.data.files import TextFile
from homodistil.data.sources import Source
from homodistil.errors import UserError, nearest

_PIECE_CHARS = 16_384  # of text tokenised at once: bounds memory
_PARQUET_BATCH_ROWS = 1024

Piece = str


class Span(NamedTuple):
    """Where some of a source's documents lie."""

    file: int
    """Index into the source's files; -1: rows of its hub data set."""
    start: int
    end: int
    """Past the last byte, row group or row; -1: to the end of the file."""
    num_bytes: int
    """About as much text as this."""


def start_of(source: Source, file: int) -> Span:
    """Where the first documents of a file lie, or of the source's hub data set, whatever a plan would make of it."""
    if source.hub is not None:
        return Span(-1, 0, min(source.hub.num_rows, _PARQUET_BATCH_ROWS), 0)
    return Span(file, 0, 1 if source.files[file].kind == ".parquet" else -1, 0)


def read(source: Source, span: Span) -> Iterator[Iterable[Piece]]:
    """Documents in a fixed order. Each one must be used up before the next is asked for.

    Raises:
        UserError: unreadable, binary, or malformed; names file and place.
    """
    if source.hub is not None:
        return (_cut(text) for text in source.hub.texts(source.text_column, span.start, span.end))
    file = source.files[span.file]
    if file.kind == ".parquet":
        return (_cut(text) for text in _parquet_texts(file, source.text_column, span))
    if file.kind == ".jsonl":
        return (_cut(text) for text in _json_texts(file, source.text_column, span))
    if file.kind == ".xml":
        return (_cut(text) for text in _dump_texts(file))
    if source.text_documents == "paragraph":
        return (_cut(text) for text in _paragraphs(_lines(file, span)))
    return iter([_whole(_lines(file, span))])


def _lines(file: TextFile, span: Span) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends. A file that is not text is refused, with the offset of the bad byte."""
    offset = span.start
    with file.reading() as raw:
        if span.start:
            raw.seek(span.start)
        for line in raw:
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


def _binary(file: TextFile, offset: int, found: str) -> UserError:
    return UserError(
        f"data.sources: {file.location!r} is not text: {found} at offset {offset}; convert the file to UTF-8 or "
        f"remove it"
    )


def _whole(lines: Iterable[str]) -> Iterator[Piece]:
    held, length = [], 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= _PIECE_CHARS:
            yield from _cut("".join(held))
            held, length = [], 0
    yield from _cut("".join(held))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _cut(text: str) -> Iterator[Piece]:
    """Pieces of at most `_PIECE_CHARS`, cut before white space: no word is torn, so the tokens stay the same."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        window = text[start : start + _PIECE_CHARS]
        spaces = re.search(r"\s\S*\Z", window[1:])
        end = start + 1 + spaces.start() if spaces else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _json_texts(file: TextFile, column: str, span: Span) -> Iterator[str]:
    for number, line in enumerate(_lines(file, span), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.sources: {_place(file, span, number)}: not valid JSON ({error.msg}, column {error.colno})"
            ) from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"data.sources: {_place(file, span, number)}: found {kind}, expected an object a line")
        if column not in record:
            raise _no_column(_place(file, span, number), column, record)
        if not isinstance(record[column], str | None):
            kind = type(record[column]).__name__
            raise UserError(
                f"data.text_column: {_place(file, span, number)}: {column!r} holds {kind}, expected a string"
            )
        if record[column]:
            yield record[column]


def _place(file: TextFile, span: Span, number: int) -> str:
    """File and line, counted from the start of the file only once something is wrong."""
    before = Span(span.file, 0, span.start, 0)
    return f"{file.location}:{number + (sum(1 for _ in _lines(file, before)) if span.start else 0)}"


def _parquet_texts(file: TextFile, column: str, span: Span) -> Iterator[str]:
    with open_parquet(file, column) as table:
        groups = range(span.start, span.end)
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text)


@contextlib.contextmanager
def open_parquet(file: TextFile, column: str) -> Iterator:
    """The file as a `pyarrow.parquet.ParquetFile` that has the column. Raises `UserError`."""
    import pyarrow.parquet

    try:
        with file.reading() as raw, pyarrow.parquet.ParquetFile(raw) as table:
            _check_column(file, table.schema_arrow, column)
            yield table
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.sources: {file.location!r} is not a readable parquet file ({error})") from None


def _check_column(file: TextFile, schema, column: str) -> None:
    import pyarrow

    if column not in schema.names:
        raise _no_column(file.location, column, schema.names)
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"data.text_column: {file.location}: {column!r} holds {kind}, expected strings")


def _dump_texts(file: TextFile) -> Iterator[str]:
    # Here: the parser of wiki markup is needed for nothing else.
    from xml.etree.ElementTree import ParseError

    from homodistil.data.embedded_text import articles

    try:
        with file.reading() as dump:
            yield from (document.text for document in articles(dump))
    except ParseError as error:
        raise UserError(
            f"data.sources: {file.location!r} is not a whole Wikipedia dump ({error}); fetch it again"
        ) from None


def _no_column(where: str, column: str, found: Iterable[str]) -> UserError:
    found = list(found)
    return UserError(
        f"data.text_column: {where} has no column {column!r}{nearest(column, found)}; found: {', '.join(found)}"
    )
