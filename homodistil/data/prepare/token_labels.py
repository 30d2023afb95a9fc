"""Ground-truth labels of words (data.label_column of a token classifier) -> one number for each token.

A line has a list of words and as many labels. The first token of a word gets its label, and its other tokens get none,
as in the example scripts of transformers. Words are joined by one space and tokenised as one text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from homodistil.data.prepare.labels import RULE_VERSION, LabelRule
from homodistil.data.sources.labelled import RawLabel
from homodistil.errors import UserError


class WordLabels(NamedTuple):
    """The labels of one text."""

    starts: np.ndarray
    """Where each word starts in the text, characters, int64 (words,), ascending."""
    numbers: np.ndarray
    """fp32 (words,), NaN where a word has none."""

    def of_tokens(self, offsets: list[tuple[int, int]], num_before: int) -> np.ndarray:
        """fp32 (tokens,), NaN but for the first token of a word that has a label.

        Args:
            offsets: of each token in what was tokenised, characters (begin, end).
            num_before: characters in front of the text.
        """
        # By its last character: a token may begin with the space in front of its word.
        last = np.array([end for _, end in offsets], dtype=np.int64) - 1 - num_before
        word = np.searchsorted(self.starts, last, "right") - 1
        is_first = np.diff(word, prepend=-1) > 0
        return np.where(is_first, self.numbers[word], np.float32(np.nan)).astype(np.float32)


class TokenLabelRule(NamedTuple):
    """How labels of words become numbers of tokens."""

    words: LabelRule
    """How the label of one word becomes a number."""
    width: int
    """Tokens of a block, of which each has a number."""

    @property
    def column(self) -> str:
        return self.words.column

    @property
    def identity(self) -> list:
        """What the numbers depend on, for a fingerprint."""
        return ["of words", RULE_VERSION, *self.words.identity]

    def read(self, label: RawLabel) -> WordLabels:
        """The labels of a text.

        Raises:
            UserError: they are not as many as there are words, or one of them is no label of the teacher's.
        """
        values = self.words.named(label)
        if values is None:
            values = [None] * len(label.words or ())
        if label.words is None or not isinstance(values, list) or len(values) != len(label.words):
            raise UserError(f"data.label_column: {label.where()}: {self._refused(label.words, values)}")
        numbers = [self.words.numbers(value, _word_of(label.where, i))[0] for i, value in enumerate(values)]
        lengths = np.array([len(word) for word in label.words], dtype=np.int64)
        return WordLabels(np.cumsum(lengths + 1) - lengths - 1, np.array(numbers, dtype=np.float32))

    def has_label(self, label: RawLabel) -> bool:
        """Whether any word has a label. Raises as `read`."""
        return not np.isnan(self.read(label).numbers).all()

    def _refused(self, words: list[str] | None, values: Any) -> str:
        labels = f"{len(values)} labels" if isinstance(values, list) else f"a {type(values).__name__}"
        given = "a text in one piece" if words is None else f"{len(words)} words"
        return (
            f"found {given} and {labels} in {self.column!r}, expected a list of words and one label for each of them; "
            f"write both as lists of the same length (null where a word has no label)"
        )


AnyLabelRule = LabelRule | TokenLabelRule
"""Of whole texts, or of their words."""


def _word_of(where: Callable[[], str], number: int) -> Callable[[], str]:
    return lambda: f"{where()}, word {number + 1}"
