"""Columns of text: reading them from parquet files, and what is said of one that is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from homodistil.data.sources.text_files import TextFile
from homodistil.errors import UserError, nearest

PARQUET_BATCH_ROWS = 1024
_PAIRS = (
    ("sentence1", "sentence2"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "answer"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
)
"""Usual names of the columns of a pair, for messages."""


def parquet_texts(file: TextFile, column: str, groups: range) -> Iterator[str]:
    return (text for (value,) in parquet_columns(file, [column], groups) if (text := joined(value)))


def joined(value: str | list[str | None] | None) -> str | None:
    """The text of a row, whose column may hold a list of words: these with one space between them."""
    return " ".join(word or "" for word in value) if isinstance(value, list) else value


def parquet_columns(
    file: TextFile, columns: Sequence[str], groups: range, label_column: str | None = None
) -> Iterator[list[Any]]:
    """Rows of these columns, which hold text (or, where there is one column, lists of words), and then of the one that
    holds labels, if there is one."""
    wanted = [*columns, label_column] if label_column else list(columns)
    with open_parquet(file, *columns) as table:
        if label_column and label_column not in table.schema_arrow.names:
            raise no_label(file.location, label_column, table.schema_arrow.names)
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=wanted):
            values = [_strings(file, batch.column(column)) for column in wanted]
            yield from map(list, zip(*values, strict=True))


def first_row(file: TextFile, group: int) -> int:
    """Rows of a parquet file before a row group."""
    with open_parquet(file) as table:
        return sum(table.metadata.row_group(i).num_rows for i in range(group))


def _strings(file: TextFile, column) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.sources: {file.location!r} holds a string that is not UTF-8 ({error.reason}); write the column "
            f"again as text"
        ) from None


@contextlib.contextmanager
def open_parquet(file: TextFile, *columns: str) -> Iterator:
    """Open a file as a `pyarrow.parquet.ParquetFile` that has these columns of text. Raises `UserError`."""
    import pyarrow.parquet

    try:
        with file.reading() as raw, pyarrow.parquet.ParquetFile(raw) as table:
            for column in columns:
                _check_column(file, table.schema_arrow, column, len(columns) > 1)
            yield table
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.sources: {file.location!r} is not a readable parquet file ({reason}); write or fetch it again"
        ) from None


def _check_column(file: TextFile, schema, column: str, is_of_pair: bool) -> None:
    import pyarrow

    if column not in schema.names:
        raise no_column(file.location, column, schema.names, is_of_pair)
    kind = schema.field(column).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    of_one = kind.value_type if is_list and not is_of_pair else kind
    if not (pyarrow.types.is_string(of_one) or pyarrow.types.is_large_string(of_one)):
        raise no_text(file.location, column, kind, is_of_pair)


def no_text(where: str, column: str, kind: Any, is_of_pair: bool) -> UserError:
    expected = "strings" if is_of_pair else "strings or lists of words"
    return UserError(f"{_field(is_of_pair)}: {where}: {column!r} holds {kind}, expected {expected}")


def no_column(where: str, column: str, columns: Iterable[str], is_of_pair: bool = False) -> UserError:
    columns = list(columns)
    usual = next((pair for pair in _PAIRS if not is_of_pair and set(pair) <= set(columns)), None)
    hint = f"; for pairs of a cross-encoder set data.pair_columns=[{usual[0]},{usual[1]}]" if usual else ""
    return UserError(
        f"{_field(is_of_pair)}: {where} has no column {column!r}{nearest(column, columns)}; "
        f"found: {', '.join(columns)}{hint}"
    )


def no_label(where: str, column: str, columns: Iterable[str]) -> UserError:
    columns = list(columns)
    return UserError(
        f"data.label_column: {where} has no column {column!r}{nearest(column, columns)}; found: {', '.join(columns)}; "
        f"name the column of the labels, and write null where there is none"
    )


def _field(is_of_pair: bool) -> str:
    return "data.pair_columns" if is_of_pair else "data.text_column"
