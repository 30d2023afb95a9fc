"""Tokens of documents -> framed blocks in a .npy file, written in order with bounded memory."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from homodistil.data.task import Frame
from homodistil.errors import UserError


class Rows(NamedTuple):
    """Consecutive rows, each a document or a part of a long one."""

    documents: np.ndarray  # (rows,) int64
    lengths: np.ndarray  # (rows,) int64, tokens per row
    values: np.ndarray  # (sum of lengths,) token ids


def split(hashes: np.ndarray, source_of: np.ndarray, fraction: float) -> np.ndarray:
    """Split documents: the `fraction` of each source with the smallest content hashes is held out.

    The split depends on content only, and equal documents of a source are on the same side, unless all are equal. Every
    source with at least two documents is on both sides; sources with a single document are split as one source.

    Args:
        hashes: content hashes, (N,) uint64.
        source_of: index of the source, (N,); -1 for documents that are left out.
        fraction: in (0, 1).

    Returns:
        (N,) int8: 1 for held-out documents, 0 for training.

    Raises:
        UserError: there are fewer than two documents, so that none can be held out.
    """
    counts = np.append(np.bincount(source_of[source_of >= 0]), 0)  # the last entry is for source -1
    group_of = np.where(counts[source_of] == 1, len(counts), source_of).astype(np.int32)
    is_heldout = np.zeros(len(hashes), dtype=np.int8)
    for group in np.unique(group_of[group_of >= 0]):
        members = group_of == group
        if (count := int(members.sum())) < 2:
            continue
        wanted = min(max(round(fraction * count), 1), count - 1)
        is_heldout[members] = _smallest(hashes[members], wanted)
    if not is_heldout.any():
        raise UserError(
            f"data.sources: found {int((source_of >= 0).sum())} document(s), at least 2 are needed (the split into "
            f"training and held-out text is by document); add text, or set data.text_documents=paragraph"
        )
    return is_heldout


def _smallest(hashes: np.ndarray, wanted: int) -> np.ndarray:
    """(N,) bool: the `wanted` smallest hashes; more or fewer if a set of equal hashes would be divided."""
    ordered = np.sort(hashes)
    low, high = (int(np.searchsorted(ordered, ordered[wanted], side)) for side in ("left", "right"))
    if low == 0 and high == len(ordered):  # all are equal
        return np.arange(len(hashes)) < wanted
    cut = low if low > 0 and (high == len(ordered) or wanted - low <= high - wanted) else high
    return hashes < ordered[cut]


class BlockFile:
    """A .npy file of a known number of blocks, written from start to end."""

    def __init__(self, path: Path, num_blocks: int, seq_len: int, dtype: np.dtype) -> None:
        self._file, self._sha256 = open(path, "wb"), hashlib.sha256()
        self._dtype, self._left, self.num_blocks = dtype, num_blocks, num_blocks
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_blocks, seq_len)}
        np.lib.format.write_array_header_1_0(self, header)

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)

    def add(self, blocks: np.ndarray) -> None:
        """Append blocks, (n, seq_len)."""
        self._left -= len(blocks)
        self.write(blocks.astype(self._dtype).tobytes())

    def close(self) -> str:
        """fsync and close the file. Returns its sha256 (hex)."""
        assert self._left == 0, self._left
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()


def framed(bodies: np.ndarray, frame: Frame) -> np.ndarray:
    """Text of blocks, (n, tokens) -> the blocks with their frame, int32."""
    columns = [np.full((len(bodies), 1), token_id) for token_id in (frame.first, frame.last) if token_id is not None]
    parts = [columns[0], bodies, columns[1]] if len(columns) == 2 else [bodies]
    return np.hstack(parts).astype(np.int32)


class Packer:
    """Cuts a stream of documents into blocks; only the last block is padded, or left out.

    Args:
        frame: ids around and between the documents.
        seq_len: tokens of a block, with its frame.
        weight: how often a block is written, on average; which ones come once more is spread evenly.
    """

    def __init__(self, frame: Frame, seq_len: int, weight: float = 1.0) -> None:
        self._frame, self._seq_len, self._weight = frame, seq_len, Fraction(str(weight))
        self._body = frame.body(seq_len)
        self._rest = np.empty(0, dtype=np.int32)
        self._last_document = -1
        self._made = 0

    def num_blocks(self, num_tokens: np.ndarray, _num_texts: np.ndarray | None = None) -> int:
        """Written for documents of so many tokens each, int64 (documents,), none of them empty."""
        length = int(num_tokens.sum()) + max(len(num_tokens) - 1, 0)
        made = length // self._body if self._frame.pad is None else -(-length // self._body)
        return int(made * self._weight)

    def add(self, rows: Rows, out: BlockFile) -> None:
        """Append the next rows; write all full blocks."""
        values = np.concatenate((self._rest, self._joined(rows)))
        full = len(values) // self._body
        blocks = framed(values[: full * self._body].reshape(full, self._body), self._frame)
        self._rest = values[full * self._body :]
        self._write(blocks, out)

    def close(self, out: BlockFile) -> None:
        if len(self._rest) and self._frame.pad is not None:
            last = np.full((1, self._seq_len), self._frame.pad, dtype=np.int32)
            content = framed(self._rest[None], self._frame)
            last[:, : content.shape[1]] = content
            self._write(last, out)

    def _joined(self, rows: Rows) -> np.ndarray:
        documents, lengths = rows.documents, rows.lengths
        if not len(documents):
            return np.empty(0, dtype=np.int32)
        before = np.append(self._last_document, documents[:-1])
        starts = (documents != before) & (before >= 0)
        self._last_document = documents[-1]
        return np.insert(rows.values, (np.cumsum(lengths) - lengths)[starts], self._frame.between).astype(np.int32)

    def _write(self, blocks: np.ndarray, out: BlockFile) -> None:
        self._made, blocks = repeated(blocks, self._weight, self._made)
        out.add(blocks)


def repeated(blocks: np.ndarray, weight: Fraction, num_before: int) -> tuple[int, np.ndarray]:
    """Blocks as often as `weight` says, which ones come once more spread evenly.

    Args:
        blocks: (n, seq_len), the next ones of their source.
        num_before: of the source, before these.

    Returns:
        num_before + n, and the blocks that are written.
    """
    num_after = num_before + len(blocks)
    if weight != 1:
        ends = np.arange(num_before, num_after + 1) * weight.numerator // weight.denominator
        blocks = np.repeat(blocks, np.diff(ends), axis=0)
    return num_after, blocks
