"""The one function that makes tables of Markdown, and the numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.harness.rows import spread

DASH = "-"


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1); the deviation of a single value is NaN."""

    mean: float
    sd: float
    num: int


Cell = str | float | Sequence[float] | Mean | None


def table(columns: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    """A table of Markdown.

    Args:
        columns: headings. What follows the first brace is the format of the column's numbers (`step ms {:.1f}`,
            `explained {:.0%}`); a heading without one is a column of text.
        lines: cells, formatted by `cell`.
    """
    headings, forms = zip(*map(_split, columns), strict=True)
    marks = ["--:" if form else "---" for form in forms]
    body = [[cell(value, form) for value, form in zip(line, forms, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, marks, *body))


def cell(value: Cell, form: str) -> str:
    """A number by `form`; several as `median [p20, p80]`; a mean as `4.123 +- 0.011`; text as it is; None as a dash."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mean):
        mean = form.format(value.mean)
        return mean if math.isnan(value.sd) else f"{mean} +- {form.format(value.sd).lstrip('+')}"
    if isinstance(value, Sequence):
        low, middle, high = (form.format(number) for number in spread(value))
        return f"{middle} [{low}, {high}]"
    return DASH if value is None or not math.isfinite(value) else form.format(value)


def _split(column: str) -> tuple[str, str]:
    heading, brace, form = column.partition("{")
    return heading.strip(), brace + form
