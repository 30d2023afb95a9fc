"""One pair of texts per block, for cross-encoders: `[CLS] a [SEP] b [SEP]` as the teacher's tokenizer frames it.

Between shards and blocks a pair is one document: its first text, one separator, its second text. Texts hold none: a
separator that is written out in a text becomes ordinary tokens.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.pairs import PairFrame, pair_frame
from homodistil.data.prepare.packing import BlockFile, Rows, repeated
from homodistil.errors import UserError

RULE_VERSION = 1
"""Part of a corpus's fingerprint; raise it when pairs are cut in another way."""
_MIN_TOKENS = 2


class PairRule(NamedTuple):
    """How a pair of texts becomes a block."""

    frame: PairFrame
    seq_len: int
    truncation: Literal["longest_first", "only_second"]
    columns: tuple[str, str]

    @property
    def separator(self) -> int:
        """Between the texts of a document of tokens."""
        return self.frame.between[-1]

    @property
    def identity(self) -> list:
        """What the blocks depend on, for a fingerprint."""
        frame = [self.frame.first, self.frame.between, self.frame.last, self.frame.pad]
        return [RULE_VERSION, *map(list, frame[:3]), frame[3], self.truncation, list(self.columns)]

    def joined(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """What is kept of the token ids of a pair's texts: no block holds more, and which is longer stays known."""
        most = self.seq_len + (len(first) > len(second))
        return first[:most], [self.separator, *second[: self.seq_len]]


def pair_rule(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PairRule:
    """The rule of `config`, which names two columns.

    Raises:
        UserError: see `pair_frame`; or a block has no space for two texts.
    """
    frame = pair_frame(tokenizer)
    if frame.body(config.seq_len) < _MIN_TOKENS:
        raise UserError(
            f"data.seq_len: found {config.seq_len}, of which the frame of a pair takes "
            f"{config.seq_len - frame.body(config.seq_len)}; allowed is "
            f"{config.seq_len - frame.body(config.seq_len) + _MIN_TOKENS} and more"
        )
    return PairRule(frame, config.seq_len, config.truncation, (config.pair_columns[0], config.pair_columns[1]))


def truncated_lengths(
    first: np.ndarray, second: np.ndarray, most: int, truncation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that stay of both texts, as tokenizers truncates pairs.

    Args:
        first, second: tokens of each, int64 (n,).
        most: tokens of both together.
        truncation: longest_first: of the longer text, until both are equal, then of both in turn; only_second: of the
            second one, unless the first one leaves it no space: then as longest_first.
    """
    short, long = np.minimum(first, second), np.maximum(first, second)
    kept_long = np.minimum(long, np.where(short > most, short, np.maximum(short, most - short)))
    is_over = short + kept_long > most
    kept_short = np.where(is_over, most // 2, short)
    kept_long = np.where(is_over, most - most // 2, kept_long)
    is_swapped = first > second
    of_first = np.where(is_swapped, kept_long, kept_short)
    of_second = np.where(is_swapped, kept_short, kept_long)
    if truncation == "only_second":
        has_space = first < most
        of_first = np.where(has_space, first, of_first)
        of_second = np.where(has_space, np.minimum(second, most - first), of_second)
    return of_first, of_second


class PairPacker:
    """Gives each pair a block. Arguments as of `TextPacker`."""

    def __init__(self, rule: PairRule, weight: float = 1.0) -> None:
        self._rule, self._weight, self._made = rule, Fraction(str(weight)), 0

    def num_blocks(self, num_tokens: np.ndarray, _num_texts: np.ndarray | None = None) -> int:
        """Written for documents of so many tokens each, int64 (documents,)."""
        return int(len(num_tokens) * self._weight)

    def add(self, rows: Rows, out: BlockFile) -> None:
        """Write the pairs of the next rows, each a document."""
        frame, seq_len = self._rule.frame, self._rule.seq_len
        starts = np.cumsum(rows.lengths) - rows.lengths
        separators = np.flatnonzero(rows.values == self._rule.separator)
        first, second = separators - starts, starts + rows.lengths - separators - 1
        kept = truncated_lengths(first, second, frame.body(seq_len), self._rule.truncation)
        blocks = np.full((len(starts), seq_len), frame.pad, dtype=np.int32)
        places = np.zeros(len(starts), dtype=np.int64)
        for ids, source, length in (
            (frame.first, None, None),
            (None, starts, kept[0]),
            (frame.between, None, None),
            (None, separators + 1, kept[1]),
            (frame.last, None, None),
        ):
            places += _written(blocks, places, ids) if source is None else _copied(blocks, places, rows, source, length)
        self._made, blocks = repeated(blocks, self._weight, self._made)
        out.add(blocks)

    def close(self, out: BlockFile) -> None:
        """Nothing is left over."""


def _written(blocks: np.ndarray, places: np.ndarray, ids: tuple[int, ...]) -> int:
    """Put the same `ids` at `places` (n,) of each block. Returns how many."""
    for i, token_id in enumerate(ids):
        blocks[np.arange(len(blocks)), places + i] = token_id
    return len(ids)


def _copied(blocks: np.ndarray, places: np.ndarray, rows: Rows, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Put `lengths` tokens of `rows` from `starts` on at `places`, all int64 (n,). Returns `lengths`."""
    block = np.repeat(np.arange(len(blocks)), lengths)
    offset = np.arange(len(block)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    blocks[block, places[block] + offset] = rows.values[starts[block] + offset]
    return lengths
