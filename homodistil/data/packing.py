"""Documents -> tokens -> blocks on disk: `train.npy`, `heldout.npy` (n, seq_len) and `corpus.json`.

Reading is one pass, tokenising runs in parallel per piece of text, packing is one vectorised pass over Arrow batches:
memory stays bounded (some bytes a document), and the result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from homodistil.data.sources import Source
from homodistil.errors import UserError

_WRITE_ROWS, _WRITE_CHARS = 4096, 1 << 22
_TOKENIZE_ROWS = 256  # pieces a batch: the tokenizer's own objects need some 100 bytes a token
_PACK_ROWS = 1024
_SCHEMA = pa.schema({"document": pa.int64(), "text": pa.large_string()})


class SpecialIds(NamedTuple):
    cls: int
    sep: int
    pad: int


def build_corpus(
    folder: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    special: SpecialIds,
    seq_len: int,
    heldout_fraction: float,
    workers: int,
) -> None:
    """Fill `folder`.

    Args:
        folder: an empty one; scratch files in it are removed at the end.
        sources: read once, in order.
        tokenizer: fast tokenizer, without truncation and padding.
        special: ids that frame and fill the blocks.
        seq_len: tokens of a block, [CLS] and [SEP] included.
        heldout_fraction: of each source's documents.
        workers: processes for tokenising (0 = this one).

    Raises:
        UserError: a source cannot be read or holds no text, or there are fewer than two documents.
    """
    texts, tokens = folder / "texts.arrow", folder / "tokens.arrow"
    hashes, source_of = _write_texts(sources, texts)
    rows = _tokenize(texts, tokens, tokenizer, workers)
    lengths = _document_lengths(rows, len(hashes))
    is_heldout = split(hashes, np.where(lengths > 0, source_of, -1), heldout_fraction)
    dtype = np.uint16 if tokenizer.get_vocab_size() < 1 << 16 else np.int32
    summary = {}
    for name, chosen in (("train", (is_heldout == 0)), ("heldout", (is_heldout == 1))):
        chosen &= lengths > 0
        packer = _Packer(folder / f"{name}.npy", lengths[chosen], special, seq_len, dtype)
        for values in _stream(rows, chosen, special.sep):
            packer.add(values)
        packer.close()
        summary[name] = {"documents": int(chosen.sum()), "tokens": int(lengths[chosen].sum()), "blocks": packer.blocks}
    (folder / "corpus.json").write_text(json.dumps(summary), encoding="utf-8")
    for scratch in folder.glob("*.arrow"):
        os.remove(scratch)


def split(hashes: np.ndarray, source_of: np.ndarray, fraction: float) -> np.ndarray:
    """1 for held-out documents, 0 for training: the `fraction` of each source with the smallest content hashes.

    Depends on content alone; equal documents of a source fall on the same side, unless all of them are equal. Every
    source with two documents or more is on both sides; sources of a single document are split as if they were one.

    Args:
        hashes: (N,) uint64.
        source_of: (N,) index of the source, -1 = not a document.
        fraction: in (0, 1).

    Raises:
        UserError: nothing to hold out, that is, fewer than two documents.
    """
    counts = np.append(np.bincount(source_of[source_of >= 0]), 0)  # the last: looked up by -1
    group_of = np.where(counts[source_of] == 1, len(counts), source_of)
    is_heldout = np.zeros(len(hashes), dtype=np.int8)
    for group in np.unique(group_of[group_of >= 0]):
        members = np.flatnonzero(group_of == group)
        if len(members) < 2:
            continue
        wanted = min(max(round(fraction * len(members)), 1), len(members) - 1)
        by_hash = members[np.argsort(hashes[members], kind="stable")]
        boundaries = np.flatnonzero(np.diff(hashes[by_hash])) + 1  # cuts that tear no set of equal documents
        if len(boundaries):
            wanted = boundaries[np.abs(boundaries - wanted).argmin()]
        is_heldout[by_hash[:wanted]] = 1
    if not is_heldout.any():
        raise UserError(
            f"data.sources: found {int((source_of >= 0).sum())} document(s), at least 2 are needed (the split into "
            f"training and held-out text is by document); add text, or set data.text_documents=paragraph"
        )
    return is_heldout


def _write_texts(sources: list[Source], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All texts as an Arrow stream of (document, piece). Returns content hashes (N,) and source indices (N,)."""
    hashes, source_of = array("Q"), array("i")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
        rows = _RowBuffer(stream)
        for index, source in enumerate(sources):
            before = len(hashes)
            for pieces in source.documents():
                digest, is_empty = hashlib.blake2b(digest_size=8), True
                for piece in pieces:
                    if piece.strip():
                        rows.add(len(hashes), piece)
                        digest.update(piece.encode("utf-8", "surrogatepass"))
                        is_empty = False
                if not is_empty:
                    hashes.append(int.from_bytes(digest.digest(), "little"))
                    source_of.append(index)
            if len(hashes) == before:
                raise UserError(f"data.sources: {source.name!r} holds no text; remove it or fill it")
        rows.flush()
    return np.array(hashes, dtype=np.uint64), np.array(source_of, dtype=np.int32)


class _RowBuffer:
    """Collects rows into record batches of a bounded size."""

    def __init__(self, stream: pa.ipc.RecordBatchStreamWriter) -> None:
        self._stream = stream
        self._documents: list[int] = []
        self._texts: list[str] = []
        self._chars = 0

    def add(self, document: int, text: str) -> None:
        self._documents.append(document)
        self._texts.append(text)
        self._chars += len(text)
        if self._chars >= _WRITE_CHARS or len(self._texts) >= _WRITE_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._texts:
            columns = [pa.array(self._documents, pa.int64()), pa.array(self._texts, pa.large_string())]
            self._stream.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._documents, self._texts, self._chars = [], [], 0


class _Tokenize:
    """Batch of texts -> token ids. A text that spells "[MASK]" is three ordinary tokens, not the special one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, batch: dict) -> dict:
        self._tokenizer.encode_special_tokens = True  # here: the switch does not survive the way to a worker process
        encodings = self._tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}


def _tokenize(texts: Path, tokens: Path, tokenizer: Tokenizer, workers: int) -> datasets.Dataset:
    """Rows (document, input_ids), in order, memory-mapped."""
    rows = datasets.Dataset.from_file(str(texts))
    with _progress_on_first_rank():
        return rows.map(
            _Tokenize(tokenizer),
            batched=True,
            batch_size=_TOKENIZE_ROWS,
            num_proc=min(workers, len(rows)) or None,
            remove_columns=["text"],
            features=datasets.Features(
                {"document": datasets.Value("int64"), "input_ids": datasets.Sequence(datasets.Value("int32"))}
            ),
            cache_file_name=str(tokens),
            load_from_cache_file=False,
            new_fingerprint="tokens",  # nothing is looked up by it; the library would otherwise hash the tokenizer
            desc="tokenising",
        )


@contextmanager
def _progress_on_first_rank() -> Iterator[None]:
    silence = os.environ.get("RANK", "0") != "0" and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


class _Piece(NamedTuple):
    """Columns of one Arrow batch."""

    documents: np.ndarray  # (rows,) int64
    lengths: np.ndarray  # (rows,) int64, tokens a row
    values: np.ndarray  # (sum of lengths,) int32


def _batches(rows: datasets.Dataset) -> Iterator[_Piece]:
    for table in rows.with_format("arrow").iter(_PACK_ROWS):
        ids = table.column("input_ids").combine_chunks()
        lengths = ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        yield _Piece(table.column("document").to_numpy(), lengths, ids.flatten().to_numpy(zero_copy_only=False))


def _document_lengths(rows: datasets.Dataset, num_documents: int) -> np.ndarray:
    """Tokens of each document, (N,) int64."""
    lengths = np.zeros(num_documents, dtype=np.int64)
    for batch in _batches(rows):
        np.add.at(lengths, batch.documents, batch.lengths)
    return lengths


def _stream(rows: datasets.Dataset, chosen: np.ndarray, sep: int) -> Iterator[np.ndarray]:
    """Token ids of the chosen documents, with `sep` between one document and the next."""
    previous = -1
    for documents, lengths, values in _batches(rows):
        keep = chosen[documents] & (lengths > 0)
        if not keep.any():
            continue
        values = values[np.repeat(keep, lengths)]
        documents, lengths = documents[keep], lengths[keep]
        before = np.append(previous, documents[:-1])
        starts = (documents != before) & (before >= 0)
        yield np.insert(values, (np.cumsum(lengths) - lengths)[starts], sep)
        previous = documents[-1]


class _Packer:
    """Cuts a stream of tokens into [CLS] ... [SEP] blocks of a .npy file; only the last block is padded."""

    def __init__(self, path: Path, lengths: np.ndarray, special: SpecialIds, seq_len: int, dtype: type) -> None:
        self._body = seq_len - 2
        self.blocks = math.ceil((int(lengths.sum()) + len(lengths) - 1) / self._body)
        self._out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(self.blocks, seq_len))
        self._special = special
        self._rest = np.empty(0, dtype=np.int32)
        self._filled = 0

    def add(self, values: np.ndarray) -> None:
        values = np.concatenate((self._rest, values))
        full = len(values) // self._body
        block = self._out[self._filled : self._filled + full]
        block[:, 0], block[:, -1] = self._special.cls, self._special.sep
        block[:, 1:-1] = values[: full * self._body].reshape(full, self._body)
        self._filled += full
        self._rest = values[full * self._body :]

    def close(self) -> None:
        if len(self._rest):
            last = np.full(self._body + 2, self._special.pad)
            last[: len(self._rest) + 2] = [self._special.cls, *self._rest, self._special.sep]
            self._out[self._filled] = last
            self._filled += 1
        assert self._filled == self.blocks, (self._filled, self.blocks)
        self._out.flush()
