"""Reads documents with their labels: lines of .jsonl files, rows of .parquet files and hub data sets
(data.label_column)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from homodistil.data.sources.columns import first_row, joined, no_label, parquet_columns
from homodistil.data.sources.documents import TEXT_COLUMN, Piece, Span, cut, json_records, json_string
from homodistil.data.sources.hub import HubText
from homodistil.data.sources.sources import Source
from homodistil.data.sources.text_files import TextFile


class RawLabel(NamedTuple):
    """A label as it stands in a file."""

    value: Any
    where: Callable[[], str]
    """File and line or row, for messages alone."""
    words: list[str] | None = None
    """The words of the text, where its column holds a list of them."""
    names: tuple[str, ...] | None = None
    """Names of the labels that its numbers stand for, in their order, where the data set gives them."""


def read_labelled(source: Source, span: Span) -> Iterator[tuple[Iterable[Piece], RawLabel]]:
    """The documents of `read` that are not empty, with the label of each. Raises as `read`.

    Args:
        source: of files that have columns or of a hub data set, with `label_column`.
    """
    for texts, label in _labelled(source, span):
        if all(text and text.strip() for text in texts):
            # Words have labels by their places in the text, which must therefore be one piece.
            yield texts if source.pair_columns or label.words is not None else cut(texts[0]), label


def _labelled(source: Source, span: Span) -> Iterator[tuple[list[str | None], RawLabel]]:
    if source.hub is not None:
        return _labelled_hub_rows(source.hub, source, span)
    file = source.files[span.file]
    return (_labelled_rows if file.kind == ".parquet" else _labelled_lines)(file, source, span)


def _labelled_hub_rows(hub: HubText, source: Source, span: Span) -> Iterator[tuple[list[str | None], RawLabel]]:
    names = hub.label_names(source.label_column)
    rows = hub.rows([*source.columns, source.label_column], span.start, span.end)
    for number, (*texts, value) in enumerate(rows, start=span.start + 1):
        where = functools.partial("{}: row {}".format, hub.name, number)
        yield [joined(text) for text in texts], RawLabel(value, where, _words(texts), names)


def _labelled_rows(file: TextFile, source: Source, span: Span) -> Iterator[tuple[list[str | None], RawLabel]]:
    rows = parquet_columns(file, source.columns, range(span.start, span.end), source.label_column)
    for number, (*texts, value) in enumerate(rows, start=1):
        where = functools.partial(_row, file, span.start, number)
        yield [joined(text) for text in texts], RawLabel(value, where, _words(texts))


def _row(file: TextFile, group: int, number: int) -> str:
    """File and row for messages; `number`: from the row group `group` on."""
    return f"{file.location}: row {first_row(file, group) + number}"


def _labelled_lines(file: TextFile, source: Source, span: Span) -> Iterator[tuple[list[str | None], RawLabel]]:
    field = "data.pair_columns" if source.pair_columns else TEXT_COLUMN
    for record, where, line in json_records(file, source.columns, span):
        if source.label_column not in record:
            raise no_label(where(), source.label_column, record)
        texts = [json_string(record, column, field, where, line) for column in source.columns]
        words = _words([record[column] for column in source.columns])
        yield texts, RawLabel(record[source.label_column], where, words)


def _words(values: list) -> list[str] | None:
    """The words of a single text, where its column holds a list of them. `values`: of the columns of text."""
    return [word or "" for word in values[0]] if isinstance(values[0], list) else None
