"""How often each piece of a tokenizer occurs in a prepared corpus."""

from __future__ import annotations

import numpy as np

from homodistil.data.rows import Rows

_ROWS_AT_ONCE = 1 << 16


def piece_counts(rows: Rows, size: int) -> np.ndarray:
    """Occurrences of each id in the blocks of one split, int64 (size,).

    Args:
        rows: ids below `size`; the special tokens around and between texts are counted like any other.
    """
    counts = np.zeros(size, dtype=np.int64)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[np.arange(first, min(first + _ROWS_AT_ONCE, len(rows)))]
        counts += np.bincount(block.ravel(), minlength=size)
    return counts
