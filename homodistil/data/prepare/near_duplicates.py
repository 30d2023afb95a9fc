"""Finds documents that are near-duplicates of an earlier one: MinHash signatures of all shards, compared by bands.

Documents that agree in a whole band are candidates; the whole signature of each candidate is compared with that of the
first of them. The signatures stay on disk. Only the hashes of one band, for a slice of their range, are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from homodistil.data.prepare.filters import NUM_HASHES, SIMILARITY, bands
from homodistil.data.prepare.shards import SIGNATURES

_SLICE_DOCUMENTS = 16_000_000  # in memory at once, 16 bytes each; with more, the signatures are read several times
_BATCH = 1 << 14


def later_copies(shards: list[Path], first: list[int], is_wanted: np.ndarray) -> np.ndarray:
    """Numbers (ascending) of the documents that are near-duplicates of an earlier one.

    Args:
        shards: folders of finished shards in corpus order.
        first: number of the first document of each shard.
        is_wanted: (N,) bool; all other documents are ignored.
    """
    signatures = [_mapped(folder) for folder in shards]
    num_bands, rows = bands()
    num_slices = 1 + int(is_wanted.sum()) // _SLICE_DOCUMENTS
    is_copy = np.zeros(len(is_wanted), dtype=bool)
    for band in range(num_bands):
        columns = slice(band * rows, (band + 1) * rows)
        for part in range(num_slices):
            keys, documents = _keys(signatures, first, is_wanted, columns, part, num_slices)
            for originals, repeats in _candidates(keys, documents):
                near = _similarity(signatures, first, originals, repeats) >= SIMILARITY
                is_copy[repeats[near]] = True
    return np.flatnonzero(is_copy)


def _mapped(folder: Path) -> np.ndarray:
    path = folder / SIGNATURES
    if not path.stat().st_size:
        return np.empty((0, NUM_HASHES), dtype=np.uint32)
    return np.memmap(path, np.uint32, mode="r").reshape(-1, NUM_HASHES)


def _keys(signatures, first, is_wanted, columns: slice, part: int, num_slices: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of one band, document numbers), (n,) each, for the hashes in slice `part` of `num_slices`."""
    keys, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, block in zip(first, signatures, strict=True):
        for offset in range(0, len(block), _BATCH):
            band = np.ascontiguousarray(block[offset : offset + _BATCH, columns])
            hashes = np.fromiter((xxhash.xxh64_intdigest(row) for row in band), np.uint64, len(band))
            documents = np.arange(start + offset, start + offset + len(band))
            here = is_wanted[documents] & (hashes % np.uint64(num_slices) == part)
            keys.append(hashes[here])
            numbers.append(documents[here])
    return np.concatenate(keys), np.concatenate(numbers)


def _candidates(keys: np.ndarray, documents: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first documents, later documents) of all sets of documents with equal keys, as pairs, in batches."""
    order = np.argsort(keys, kind="stable")  # documents ascend, so the first of a set is the earliest
    keys, documents = keys[order], documents[order]
    is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    starts = np.flatnonzero(is_first)
    repeats = np.flatnonzero(~is_first)
    originals = starts[np.searchsorted(starts, repeats) - 1]
    for offset in range(0, len(repeats), _BATCH):
        batch = slice(offset, offset + _BATCH)
        yield documents[originals[batch]], documents[repeats[batch]]


def _similarity(signatures, first, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of pairs of documents, (n,) float64."""
    return (_rows(signatures, first, left) == _rows(signatures, first, right)).mean(axis=1)


def _rows(signatures, first, documents: np.ndarray) -> np.ndarray:
    """Signatures of `documents`, (n, NUM_HASHES) uint32."""
    shard_of = np.searchsorted(first, documents, "right") - 1
    rows = np.empty((len(documents), NUM_HASHES), dtype=np.uint32)
    for shard in np.unique(shard_of):
        here = shard_of == shard
        rows[here] = signatures[shard][documents[here] - first[shard]]
    return rows
