"""The numbers of a benchmark for programs: one row of JSON per number, and statistics of repeated measurements."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence


class Rows(list):
    """Rows `{name, variant, metric, unit, x, value, p20, p80, config}` of one benchmark."""

    def __init__(self, name: str, config: dict) -> None:
        super().__init__()
        self.name, self.config = name, config

    def add(
        self, variant: str, metric: str, unit: str, x: str | float, values: Sequence[float] | float, **config
    ) -> dict:
        """One number: the median of `values` with their 20th and 80th percentiles. `config` adds to that of all rows.

        Returns:
            The row, to which a benchmark may add fields of its own.
        """
        low, middle, high = spread(values if isinstance(values, Sequence) else [values])
        numbers = {"value": middle, "p20": low, "p80": high}
        row = {"name": self.name, "variant": variant, "metric": metric, "unit": unit, "x": x, **numbers}
        self.append(row | {"config": self.config | config})
        return self[-1]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, for measurements that took turns: what slows one round down slows both sides down."""
    return [value / other for value, other in zip(values, base, strict=True)]


def to_json(rows: Sequence[dict]) -> str:
    """A JSON array with one row per line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f"[\n{lines}\n]\n"
