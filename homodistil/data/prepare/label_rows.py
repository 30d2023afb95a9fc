"""Labels of documents, as shards have them -> one row for each block, in the order of the blocks.

Texts with labels are whole documents, so that each document of a split has one block, as often as the weight of its
source says. N documents, n blocks, W numbers of a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from homodistil.data.prepare.packing import BlockFile, repeated
from homodistil.data.prepare.shards import LABEL, LABELS


def labels_file(split: str) -> str:
    """Name of the file of a split's labels, beside its blocks."""
    return f"{split}_labels.npy"


def document_labels(shards: Sequence[Path], width: int) -> np.ndarray:
    """Labels of all documents in corpus order, fp32 (N, `width`); `shards`: their folders, in order."""
    return np.concatenate([np.fromfile(folder / LABELS, LABEL).reshape(-1, width) for folder in shards])


def token_labels(shards: Sequence[Path], num_tokens: np.ndarray, first: int, body: int, seq_len: int) -> np.ndarray:
    """Labels of the tokens of all documents at their places in a block, fp32 (N, seq_len), NaN around them.

    Args:
        shards: as of `document_labels`.
        num_tokens: of documents, int64 (N,).
        first: place of the first token of a text in its block.
        body: tokens of a text in a block; what is longer is truncated.
        seq_len: tokens of a block.
    """
    flat = np.concatenate([np.fromfile(folder / LABELS, LABEL) for folder in shards])
    starts, place = np.cumsum(num_tokens) - num_tokens, np.arange(body)
    is_there = place < num_tokens[:, None]
    rows = np.full((len(num_tokens), seq_len), np.nan, dtype=np.float32)
    rows[:, first : first + body][is_there] = flat[(starts[:, None] + place)[is_there]]
    return rows


def block_labels(labels: np.ndarray, is_on: np.ndarray, source_of: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Labels of the blocks of a split, fp32 (n, W).

    Args:
        labels: of documents, (N, W).
        is_on: (N,) bool, the documents of the split.
        source_of: (N,), ascending.
        weights: of the sources; empty: all are 1.
    """
    if set(weights) <= {1.0}:
        return labels[is_on]
    of_sources = [labels[is_on & (source_of == index)] for index in range(len(weights))]
    rows = (repeated(part, Fraction(str(weight)), 0)[1] for part, weight in zip(of_sources, weights, strict=True))
    return np.concatenate(list(rows))


def write_labels(path: Path, rows: np.ndarray) -> str:
    """Write `rows` (n, W) as .npy. Returns the sha256 (hex)."""
    file = BlockFile(path, len(rows), rows.shape[1], LABEL)
    file.add(rows)
    return file.close()
