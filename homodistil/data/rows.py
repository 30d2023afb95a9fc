"""Memory-mapped rows of one split: blocks of token ids, or of the text in each block a teacher's pooled state
or the label."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from homodistil.errors import UserError


class Rows:
    """Memory-mapped blocks of one split. `rows[ids]` is (n, seq_len) int64; only the last block has padding, unless
    every block holds one text."""

    _dtype: ClassVar[type] = np.int64
    _again: ClassVar[str] = "prepares the corpus again"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blocks = np.load(path, mmap_mode="r")
        # Deleting the file does no harm while it is open; truncating it does, and must be noticed.
        self._file = open(path, "rb")
        self._num_bytes = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, ids: np.ndarray | list[int]) -> np.ndarray:
        if os.fstat(self._file.fileno()).st_size < self._num_bytes:  # reading the map beyond the end is fatal (SIGBUS)
            raise UserError(
                f"{self.path}: was cut short while it was being read; run again with run.resume=auto, which "
                f"{self._again}"
            )
        return np.asarray(self._blocks[np.asarray(ids, dtype=np.int64)], dtype=self._dtype)

    def __reduce__(self) -> tuple:
        # Otherwise a memmap would be pickled with its whole content for a loader process.
        return type(self), (self.path,)


class OutputRows(Rows):
    """A teacher's pooled states of the texts of one split: `rows[ids]` is (n, D) fp32."""

    _dtype = np.float32
    _again = "computes the teacher's outputs again"


class LabelRows(Rows):
    """Labels of the texts of one split: `rows[ids]` is (n, W) fp32, NaN where a text has none (prepare/labels.py)."""

    _dtype = np.float32


class TextLabels(NamedTuple):
    """Labels of every text of a corpus (data.label_column); row i belongs to block i."""

    train: LabelRows
    heldout: LabelRows


class TextOutputs(NamedTuple):
    """A teacher's pooled states of every text of a corpus (teacher.outputs=stored); row i belongs to block i."""

    train: OutputRows
    heldout: OutputRows
