"""Tables and numbers as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from study.statistics import Spread

DASH = "-"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others numbers."""
    marks = ["---"] + ["--:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, marks, *lines))


def plus_minus(found: Spread | None, form: str) -> str:
    """`4.123 +- 0.011`; the deviation of a single seed is left out."""
    if found is None:
        return DASH
    mean = form.format(found.mean)
    return mean if math.isnan(found.sd) else f"{mean} +- {form.format(found.sd).lstrip('+')}"


def number(value: float | None, form: str) -> str:
    return DASH if value is None or not math.isfinite(value) else form.format(value)


def failures(errors: dict[str, str]) -> list[str]:
    """A section, where there is anything to say."""
    lines = "\n".join(f"* {label}: {error}" for label, error in errors.items())
    return [f"## Runs that failed\n\n{lines}"] if errors else []
