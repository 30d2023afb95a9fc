"""Rows of several runs -> models: the seeds of one model are combined to a mean and a standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from homodistil.metrics.result_table import DASH

# Column -> (heading, how a number is written). Further columns of the rows follow, with their names as headings.
COLUMNS = {
    "parameters": ("parameters", "{:,.0f}"),
    "hidden_size": ("hidden size", "{:,.0f}"),
    "heldout_mlm_loss": ("held-out MLM loss", "{:.3f}"),
    "masked_top1": ("masked top-1", "{:.4f}"),
    "heldout_lm_loss": ("held-out loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:,.2f}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "kl_to_teacher": ("KL to teacher", "{:.3f}"),
    "cosine_to_teacher": ("cosine to teacher", "{:.4f}"),
    "recall_at_10": ("recall@10", "{:.3f}"),
    "glue": ("GLUE, mean score", "{:.4f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "ms_per_sentence": ("ms per sentence", "{:,.2f}"),
}
_NO_NUMBER = ("name", "seed", "seeds", "tokens_per_s_first", "tokens_per_s_last", "heldout_mlm_loss_before_correction")
_OTHER_FORM = "{:.4g}"


Values = dict[str, list[float]]
"""Column -> its numbers, one per seed."""


class Spread(NamedTuple):
    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1 in the denominator); None if there is only one value."""


@dataclass(frozen=True)
class Model:
    """One method at one size: the values of its seeds."""

    name: str
    values: Mapping[str, Sequence[float]]
    """Column -> one value per seed; columns that were measured with no seed are absent."""
    num_seeds: int

    def spread(self, column: str) -> Spread | None:
        """Mean and deviation over the seeds; None if the column was not measured."""
        values = self.values.get(column)
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def mean(self, column: str) -> float | None:
        spread = self.spread(column)
        return spread and spread.mean


def models(rows: Iterable[Mapping[str, Any]]) -> list[Model]:
    """Combine rows with the same name, parameter count and hidden size: they are seeds of one model.

    A value may be a number or a list of numbers, one per seed. Values that are not finite numbers (None, text) count as
    not measured. Rows with the same `seed` are repeated measurements: their mean counts once. Of rows without a seed,
    those that are equal in every number count once.
    """
    groups: dict[tuple, dict[Any, list[Values]]] = {}
    for row in rows:
        numbers = {name: values for name, value in _with_speed(row).items() if (values := _numbers(name, value))}
        key = (
            str(row.get("name", "model")),
            *(tuple(numbers.get(name, ())[:1]) for name in ("parameters", "hidden_size")),
        )
        seed = row.get("seed")
        same = groups.setdefault(key, {}).setdefault(repr(numbers) if seed is None else f"seed {seed}", [])
        if seed is not None or not same:
            same.append(numbers)
    return [_model(key[0], [_once(same) for same in group.values()]) for key, group in groups.items()]


def _once(same: Sequence[Values]) -> Values:
    """The mean of several measurements of one seed."""
    if len(same) == 1:
        return same[0]
    names = dict.fromkeys(name for numbers in same for name in numbers)
    return {name: [statistics.fmean(v for numbers in same for v in numbers.get(name, ()))] for name in names}


def _with_speed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `tokens_per_s`: rows of runs have two speeds, and the one at the final width is used."""
    return {"tokens_per_s": row.get("tokens_per_s_last"), **row}


def _numbers(name: str, value: Any) -> list[float]:
    if name in _NO_NUMBER:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]


def _model(name: str, group: Sequence[Values]) -> Model:
    values: dict[str, list[float]] = {}
    for numbers in group:
        for column, of_seeds in numbers.items():
            values.setdefault(column, []).extend(of_seeds)
    for column in ("parameters", "hidden_size"):
        values[column] = values.get(column, [])[:1]
    return Model(name, {c: v for c, v in values.items() if v}, max(map(len, values.values()), default=0))


def columns(compared: Sequence[Model]) -> dict[str, tuple[str, str]]:
    """Column -> (heading, form): `COLUMNS` and further columns, without those that no model has a value for."""
    named = dict.fromkeys(column for model in compared for column in model.values)
    forms = COLUMNS | {name: (name.replace("_", " "), _OTHER_FORM) for name in named if name not in COLUMNS}
    return {name: form for name, form in forms.items() if name in named}


def cell(model: Model, column: str, form: str) -> str:
    """ "4.123 \u00b1 0.004"; the mean alone if there is no deviation; a dash if there is no value."""
    spread = model.spread(column)
    if spread is None:
        return DASH
    if form == _OTHER_FORM and abs(spread.mean) >= 1000:
        form = COLUMNS["parameters"][1]
    mean = form.format(spread.mean)
    return mean if spread.deviation is None else f"{mean} \N{PLUS-MINUS SIGN} {form.format(spread.deviation)}"
