"""Ground-truth labels (data.label_column): what stands in a file -> the numbers that a loss compares with.

A text has a row of W numbers, NaN where it has no label. The teacher's config.json says what they are:

    single_label_classification    W = 1, the number of the label that holds
    multi_label_classification     W = labels, 1 where a label holds and 0 where it does not
    regression                     W = labels, a score each

Names are the teacher's (`label2id`), so that they mean the same whatever the order of another data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from homodistil.data.sources.labelled import RawLabel
from homodistil.errors import UserError, nearest
from homodistil.models.classifier import NO_LABEL, ProblemType

RULE_VERSION = 1
"""Part of a corpus's fingerprint; raise it when labels become other numbers."""
_MOST_SHOWN = 12
_LARGEST = float(np.finfo(np.float32).max)


class LabelRule(NamedTuple):
    """How labels become numbers."""

    column: str
    problem_type: ProblemType
    names: tuple[str, ...]
    """The teacher's, in the order of its logits."""

    @property
    def width(self) -> int:
        """Numbers of a text."""
        return 1 if self.problem_type == "single_label_classification" else len(self.names)

    @property
    def identity(self) -> list:
        """What the numbers depend on, for a fingerprint."""
        return [RULE_VERSION, self.column, self.problem_type, list(self.names)]

    def read(self, label: RawLabel) -> list[float]:
        """The row of a text with this label, of `width` numbers. Raises as `numbers`."""
        return self.numbers(self.named(label), label.where)

    def named(self, label: RawLabel) -> Any:
        """The value of a label, by the teacher's names where the data set gives its own numbers these names: they mean
        the same whatever the order of both. Elsewhere its numbers are taken for the teacher's."""
        if label.names is None:
            return label.value
        names = label.names if set(label.names) <= set(self.names) else range(len(label.names))

        def of_one(value: Any) -> Any:
            is_known = isinstance(value, int) and 0 <= value < len(names)
            return names[value] if is_known else None if value == -1 else value

        return [of_one(value) for value in label.value] if isinstance(label.value, list) else of_one(label.value)

    def has_label(self, label: RawLabel) -> bool:
        """Whether the text has a label. Raises as `numbers`."""
        return not math.isnan(self.read(label)[0])

    def numbers(self, value: Any, where: Callable[[], str]) -> list[float]:
        """The row of a text, of `width` numbers.

        Args:
            value: as JSON or parquet has it.
            where: file and line, for messages.

        Raises:
            UserError: it is no label of the teacher's.
        """
        if _is_missing(value):
            return [math.nan] * self.width
        made = READERS[self.problem_type](self, value)
        if made is None:
            raise UserError(f"data.label_column: {where()}: {self.column!r} holds {self._refused(value)}")
        return made

    def _one(self, value: Any) -> list[float] | None:
        """The label that holds."""
        number = self.names.index(value) if value in self.names else value
        is_number = _is_number(number) and number == int(number) and 0 <= number < len(self.names)
        return [float(number)] if is_number else None

    def _each(self, value: Any) -> list[float] | None:
        """Labels of which any number hold: names of those that do, or one number for each label."""
        values = value if isinstance(value, list) else [value]
        if all(isinstance(name, str) for name in values):
            is_known = set(values) <= set(self.names)
            return [float(name in values) for name in self.names] if is_known else None
        numbers = self._scores(values)
        return numbers if numbers and all(0 <= number <= 1 for number in numbers) else None

    def _scores(self, value: Any) -> list[float] | None:
        values = value if isinstance(value, list) else [value]
        is_whole = len(values) == len(self.names) and all(map(_is_number, values))
        return [float(number) for number in values] if is_whole else None

    def _refused(self, value: Any) -> str:
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
        names, many = ", ".join(self.names[:_MOST_SHOWN]), ", ..." * (len(self.names) > _MOST_SHOWN)
        close = nearest(value, self.names) if isinstance(value, str) else ""
        numbers = f"{len(self.names)} number{'s' * (len(self.names) > 1)}"
        allowed = {
            "single_label_classification": f"the teacher's labels ({names}{many}) and their numbers "
            f"0 .. {len(self.names) - 1}",
            "multi_label_classification": f"a list of those of the teacher's labels that hold ({names}{many}), or of "
            f"{numbers} from 0 to 1",
            "regression": f"{numbers}, as the teacher's labels are scores",
        }[self.problem_type]
        return f"{shown}{close}, allowed are {allowed}; write null (or {NO_LABEL}) where a text has no label"


READERS: dict[ProblemType, Callable[[LabelRule, Any], list[float] | None]] = {
    "single_label_classification": LabelRule._one,
    "multi_label_classification": LabelRule._each,
    "regression": LabelRule._scores,
}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and (value != value or value == NO_LABEL))


def _is_number(value: Any) -> bool:
    """Also `true` and `false`, which are 1 and 0."""
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST
