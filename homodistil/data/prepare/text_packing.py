"""One text per block: `[CLS] prompt text [SEP]` and padding, for tasks that learn vectors of texts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from homodistil.data.prepare import document_table
from homodistil.data.prepare.packing import BlockFile, Rows, repeated
from homodistil.data.prepare.texts import TextRule
from homodistil.data.task import Frame


class TextPacker:
    """Cuts documents into texts, and gives each a block; longer texts are truncated.

    Args:
        frame: with a first, a last and a padding token.
        seq_len: tokens of a block, with its frame and the prompt.
        rule: what a text is. Of sentences, every row is one already.
        weight: as of `Packer`.
    """

    def __init__(self, frame: Frame, seq_len: int, rule: TextRule, weight: float = 1.0) -> None:
        self._frame, self._seq_len, self._rule, self._weight = frame, seq_len, rule, Fraction(str(weight))
        self._body = frame.body(seq_len) - len(rule.prompt)
        self._last_document = -1
        self._made = 0

    def num_blocks(self, num_tokens: np.ndarray, num_texts: np.ndarray) -> int:
        """Written for documents of so many tokens and (sentences) texts each, int64 (documents,), none of them 0."""
        if self._rule.unit == "passage":
            whole_rows, rest = np.divmod(num_tokens, document_table.ROW_TOKENS)
            num_texts = whole_rows * -(-document_table.ROW_TOKENS // self._body) + -(-rest // self._body)
        made = len(num_tokens) if self._rule.unit == "document" else int(num_texts.sum())
        return int(made * self._weight)

    def add(self, rows: Rows, out: BlockFile) -> None:
        """Write the texts of the next rows."""
        starts, lengths = self._texts(rows)
        lengths = np.minimum(lengths, self._body)
        place = np.arange(self._body)
        is_text = place < lengths[:, None]
        blocks = np.full((len(starts), self._seq_len), self._frame.pad, dtype=np.int32)
        before = [self._frame.first, *self._rule.prompt]
        blocks[:, : len(before)] = before
        blocks[:, len(before) : len(before) + self._body][is_text] = rows.values[(starts[:, None] + place)[is_text]]
        blocks[np.arange(len(blocks)), len(before) + lengths] = self._frame.last
        self._made, blocks = repeated(blocks, self._weight, self._made)
        out.add(blocks)

    def close(self, out: BlockFile) -> None:
        """Nothing is left over."""

    def _texts(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Where texts start in the values of `rows`, and how long they are, int64 (texts,)."""
        starts = np.cumsum(rows.lengths) - rows.lengths
        if self._rule.unit == "sentence":
            return starts, rows.lengths
        if self._rule.unit == "document":
            before = np.append(self._last_document, rows.documents[:-1])
            self._last_document = rows.documents[-1] if len(rows.documents) else self._last_document
            begins = rows.documents != before
            return starts[begins], rows.lengths[begins]
        num_pieces = -(-rows.lengths // self._body)
        row_of = np.repeat(np.arange(len(rows.lengths)), num_pieces)
        piece = np.arange(len(row_of)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        edges = [rows.lengths[row_of] * number // num_pieces[row_of] for number in (piece, piece + 1)]
        return starts[row_of] + edges[0], edges[1] - edges[0]
