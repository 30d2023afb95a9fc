"""Documents that are nearly the same as an earlier one: MinHash signatures of all shards, compared band by band.

In each band, documents whose hashes in it are equal are candidates; each is compared with the first of them, whole
signature with whole signature. The signatures stay on disk; in memory are the hashes of one band, a slice of their
range at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from homodistil.data.prepare.filters import NUM_HASHES, SIMILARITY, bands
from homodistil.data.prepare.shards import SIGNATURES

_SLICE_DOCUMENTS = 16_000_000  # in memory at once, 16 bytes each; more documents mean more passes over the signatures
_BATCH = 1 << 14


def later_copies(shards: list[Path], first: list[int], is_wanted: np.ndarray) -> np.ndarray:
    """Numbers (ascending) of documents that are nearly the same as an earlier one.

    Args:
        shards: folders of finished shards in corpus order.
        first: number of each one's first document.
        is_wanted: (N,) bool; others neither go nor make others go.
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
    """(hashes of one band, document numbers) of one slice of the hashes' range, (n,) each."""
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
    """(first document of a set with equal keys, another one of it), in batches."""
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
    """Signatures of some documents, (n, NUM_HASHES) uint32."""
    shard_of = np.searchsorted(first, documents, "right") - 1
    rows = np.empty((len(documents), NUM_HASHES), dtype=np.uint32)
    for shard in np.unique(shard_of):
        here = shard_of == shard
        rows[here] = signatures[shard][documents[here] - first[shard]]
    return rows
