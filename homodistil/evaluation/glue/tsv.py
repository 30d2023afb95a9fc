"""Reads a split from a TSV file in the official GLUE layout. Fields are never quoted; quote marks are text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from homodistil.errors import UserError
from homodistil.evaluation.glue.tasks import MAX_SIMILARITY, Task

# In the official QQP files a few of 360,000 rows are broken; more than this means another layout.
_MAX_BROKEN, _MAX_BROKEN_FRACTION = 10, 0.01


class Split(NamedTuple):
    """Labelled examples."""

    texts: list[tuple[str, ...]]
    """One or two sentences per example."""
    labels: list[int] | list[float]
    """Class numbers, or similarities from 0 to 5."""
    num_broken: int = 0
    """Number of rows with missing fields, which were left out."""


def read_split(task: Task, file: Path) -> Split:
    """The labelled examples of `file`.

    Raises:
        UserError: the file cannot be read, lacks a column, has a row with a wrong number of fields, an unknown label,
            or no example.
    """
    rows = _rows(file)
    number, first = next(rows, (1, []))
    columns = list(task.columns or first)
    wanted = [_position(task, file, columns, name) for name in (*task.texts, task.label)]
    split, broken = Split([], []), []
    if task.columns is not None and first:
        _add(task, file, split, broken, columns, wanted, number, first)
    for number, row in rows:
        _add(task, file, split, broken, columns, wanted, number, row)
    _check(task, file, split, broken)
    return split._replace(num_broken=len(broken))


def class_number(task: Task, where: str, label: str) -> int | float:
    """The class number or similarity of a label in a file. Raises `UserError`, whose message begins with `where`."""
    if task.labels is not None:
        if label not in task.labels:
            raise UserError(
                f"{where}: found label {label!r}, {task.title} allows {', '.join(task.labels)}; "
                f"correct the row, or give a split that has labels"
            )
        return list(task.labels).index(label)
    try:
        score = float(label)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= MAX_SIMILARITY:
        raise UserError(
            f"{where}: found similarity {label!r}, {task.title} allows numbers from 0 to {MAX_SIMILARITY:g}; "
            f"correct the row, or give a split that has labels"
        )
    return score


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line. Only line feeds end lines; other Unicode line breaks occur in sentences."""
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(
                        f"{file}, line {number}: found a NUL character, which is no text; remove it, or give the "
                        f"official file"
                    )
                if line := line.rstrip("\r\n"):
                    yield number, line.split("\t")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the folder of the official files") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: found bytes that are not UTF-8 (at byte {error.start}); convert the file") from None


def _position(task: Task, file: Path, columns: list[str], name: str) -> int:
    if name not in columns:
        names = ", ".join(repr(column[:40]) for column in columns[:16]) or "an empty file"
        raise UserError(
            f"{file}: found columns {names}; {task.title} needs {', '.join((*task.texts, task.label))} in the first "
            f"line, TAB-separated; give the official file (a test file has no labels)"
        )
    return columns.index(name)


def _add(task, file, split: Split, broken: list[int], columns, wanted: list[int], number: int, row: list[str]) -> None:
    if len(row) != len(columns):
        if task.drops_broken_rows:
            broken.append(number)
            return
        raise UserError(
            f"{file}, line {number}: found {len(row)} TAB-separated fields, {task.title} has {len(columns)} "
            f"({', '.join(columns)}); give the official file, or correct the row"
        )
    *texts, label = (row[position] for position in wanted)
    split.texts.append(tuple(texts))
    split.labels.append(class_number(task, f"{file}, line {number}", label))


def _check(task: Task, file: Path, split: Split, broken: list[int]) -> None:
    if len(broken) > max(_MAX_BROKEN, _MAX_BROKEN_FRACTION * len(split.labels)):
        raise UserError(
            f"{file}: found {len(broken)} rows with a wrong number of fields (the first in line {broken[0]}), allowed "
            f"are {_MAX_BROKEN} or {_MAX_BROKEN_FRACTION:.0%}; give the official {task.title} file"
        )
    if not split.labels:
        raise UserError(f"{file}: found no example, expected at least one row; give the official {task.title} file")
