"""A table of all documents of a corpus, read from its finished shards; about 30 bytes per document in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homodistil.data.prepare.packing import Rows
from homodistil.data.prepare.shard_plan import Plan
from homodistil.data.prepare.shards import DOCUMENTS, TEXT_LENGTH, TEXTS, TOKENS

ROW_TOKENS = 1 << 20
"""Maximum of a row, and in memory at once. A passage never lies in two rows."""


@dataclass
class DocumentTable:
    """Columns of all N documents in corpus order, (N,) each."""

    hashes: np.ndarray  # uint64
    num_tokens: np.ndarray  # int64
    num_bytes: np.ndarray  # int64
    dropped_by: np.ndarray  # uint8, 0 = kept
    source_of: np.ndarray  # int32
    first: list[int]
    """Number of the first document of each shard."""
    num_texts: np.ndarray  # int64, of documents that are more than one text each; 1 otherwise

    @property
    def is_kept(self) -> np.ndarray:
        """(N,) bool: documents that have tokens and were not filtered out."""
        return (self.dropped_by == 0) & (self.num_tokens > 0)


def document_table(plan: Plan, folders: list[Path]) -> DocumentTable:
    """Read the table from `folders`, the folders of the finished shards of `plan` in order."""
    sizes = [len(_documents(folder)) for folder in folders]
    first = np.cumsum([0, *sizes])
    total = int(first[-1])
    columns = {name: np.empty(total, kind) for name, kind in _COLUMNS.items()}
    source_of, num_texts = np.empty(total, dtype=np.int32), np.ones(total, dtype=np.int64)
    for shard, folder, start in zip(plan.shards, folders, first, strict=False):
        rows = _documents(folder)
        for name, column in columns.items():
            column[start : start + len(rows)] = rows[name]
        source_of[start : start + len(rows)] = shard.source
        if (texts := _texts(folder)) is not None:
            num_texts[start : start + len(rows)] = np.bincount(texts[0], minlength=len(rows))
    hashes, *rest = columns.values()
    return DocumentTable(hashes, *rest, source_of, first[:-1].tolist(), num_texts)


_COLUMNS = {"hash": np.uint64, "num_tokens": np.int64, "num_bytes": np.int64, "dropped_by": np.uint8}


def _documents(folder: Path) -> np.ndarray:
    return np.load(folder / DOCUMENTS)


def _texts(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a shard with several texts per document: each text's document, counted from 0, and length, int64 (texts,)."""
    if not (folder / TEXTS).exists():
        return None
    lengths = np.fromfile(folder / TEXTS, TEXT_LENGTH).astype(np.int64)
    ends = np.cumsum(_documents(folder)["num_tokens"])
    return np.searchsorted(ends, np.cumsum(lengths) - lengths, "right"), lengths


def _row_lengths(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each row's document, counted from 0, and length, int64 (rows,): a row for each text, or a document in parts."""
    if (texts := _texts(folder)) is not None:
        return texts
    num_tokens = _documents(folder)["num_tokens"]
    rows_of = -(-num_tokens // ROW_TOKENS)
    documents = np.repeat(np.arange(len(num_tokens)), rows_of)
    lengths = np.full(len(documents), ROW_TOKENS)
    last = np.cumsum(rows_of)[rows_of > 0] - 1
    lengths[last] = (num_tokens - (rows_of - 1) * ROW_TOKENS)[rows_of > 0]
    return documents, lengths


def token_rows(folder: Path, first: int, dtype: np.dtype) -> Iterator[Rows]:
    """Tokens of a shard, a limited number at a time; long documents are several rows, as are those of several texts.

    Args:
        folder: of the shard.
        first: number of its first document.
        dtype: of its tokens.
    """
    documents, lengths = _row_lengths(folder)
    documents, ends = documents + first, np.cumsum(lengths)
    with open(folder / TOKENS, "rb") as file:
        start = 0
        while start < len(lengths):
            before = int(ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(ends, before + ROW_TOKENS, "right")))
            values = np.fromfile(file, dtype, int(ends[end - 1]) - before)
            yield Rows(documents[start:end], lengths[start:end], values)
            start = end


def chosen(rows: Rows, is_chosen: np.ndarray) -> Rows:
    """The rows of the chosen documents.

    Args:
        is_chosen: (N,) bool, over the documents of the corpus.
    """
    keep = is_chosen[rows.documents]
    if keep.all():
        return rows
    return Rows(rows.documents[keep], rows.lengths[keep], rows.values[np.repeat(keep, rows.lengths)])
