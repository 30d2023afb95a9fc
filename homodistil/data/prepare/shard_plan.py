"""Sources -> shards: a fixed list of units of work of about the same size, cut between documents.

The list depends only on the files and `data.shard_bytes`. A shard number thus means the same text in all workers and
array tasks, whenever they are started.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from homodistil.data.sources.columns import open_parquet
from homodistil.data.sources.documents import Span
from homodistil.data.sources.sources import Source
from homodistil.data.sources.text_files import TextFile

_PART_BYTES = 16 << 20  # of a line in memory at once
_PARTS_VERSION = 1  # of the files that shards.py writes; increase it when they change


class Shard(NamedTuple):
    source: int
    """Index into the sources."""
    spans: list[Span]

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)


@dataclass(frozen=True)
class Plan:
    shards: list[Shard]
    hash: str
    """sha256 of everything that the shards and the corpus depend on."""


def make_plan(sources: list[Source], shard_bytes: int, fingerprint: str) -> Plan:
    """Shards in the order of sources, files and documents.

    Args:
        sources: from `open_sources`.
        shard_bytes: approximate bytes of text per shard; a longer document is not divided.
        fingerprint: of the corpus.

    Raises:
        UserError: a file cannot be read.
    """
    shards = [
        Shard(index, spans)
        for index, source in enumerate(sources)
        for spans in _grouped(_spans(source, shard_bytes), shard_bytes)
    ]
    content = json.dumps([_PARTS_VERSION, fingerprint, shard_bytes, shards])
    return Plan(shards, hashlib.sha256(content.encode()).hexdigest())


def _grouped(spans: Iterator[Span], shard_bytes: int) -> Iterator[list[Span]]:
    """Group consecutive spans to shards of up to `shard_bytes`, so that small files share a shard."""
    held, num_bytes = [], 0
    for span in spans:
        if held and num_bytes + span.num_bytes > shard_bytes:
            yield held
            held, num_bytes = [], 0
        held.append(span)
        num_bytes += span.num_bytes
    if held:
        yield held


def _spans(source: Source, shard_bytes: int) -> Iterator[Span]:
    if source.hub is not None:
        yield from _row_spans(source.hub.num_rows, source.hub.num_bytes, shard_bytes)
    for index, file in enumerate(source.files):
        size = file.num_bytes()
        if file.kind == ".parquet":
            yield from _row_group_spans(index, file, source.columns, shard_bytes)
        elif not _can_be_cut(source, file, size, shard_bytes):
            yield Span(index, 0, -1, size if size is not None else shard_bytes)
        else:
            with file.reading() as raw:
                is_blank_needed = file.kind == ".txt"
                cuts = [0, *_cuts(raw, size, shard_bytes, is_blank_needed), size]
            for start, end in zip(cuts, cuts[1:], strict=False):
                yield Span(index, start, end, end - start)


def _can_be_cut(source: Source, file: TextFile, size: int | None, shard_bytes: int) -> bool:
    """Whether a large, uncompressed file has several documents in lines, and can be read from any offset."""
    if size is None or size <= shard_bytes or file.compression:
        return False
    is_of_many = file.kind == ".jsonl" or (file.kind == ".txt" and source.text_documents == "paragraph")
    return is_of_many and file.has_ranges()


def _cuts(raw: BinaryIO, size: int, shard_bytes: int, is_blank_needed: bool) -> Iterator[int]:
    """Offsets of cuts after a line end or, if needed, a blank line: the first ones at least `shard_bytes` apart."""
    cut = shard_bytes
    while cut < size:
        raw.seek(cut - 1)
        cut += _line(raw)[0] - 1
        if is_blank_needed:
            while (line := _line(raw))[0] and not line[1]:
                cut += line[0]
            cut += line[0]
        if cut < size:
            yield cut
        cut += shard_bytes


def _line(raw: BinaryIO) -> tuple[int, bool]:
    """(bytes of the next line, whether it is blank); a long line is read in parts."""
    num_bytes, is_blank = 0, True
    limit = (_PART_BYTES,) if isinstance(raw, io.BufferedIOBase) else ()  # clients of object stores have no limit
    while part := raw.readline(*limit):
        num_bytes += len(part)
        is_blank = is_blank and not part.decode("utf-8", "replace").strip()
        if part.endswith(b"\n"):
            break
    return num_bytes, is_blank


def _row_group_spans(index: int, file: TextFile, columns: Sequence[str], shard_bytes: int) -> Iterator[Span]:
    with open_parquet(file, *columns) as table:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    start = 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[start : end + 1]) > shard_bytes:
            yield Span(index, start, end, sum(sizes[start:end]))
            start = end


def _row_spans(num_rows: int, num_bytes: int, shard_bytes: int) -> Iterator[Span]:
    step = max(1, num_rows * shard_bytes // max(num_bytes, 1))
    for start in range(0, num_rows, step):
        rows = min(step, num_rows - start)
        yield Span(-1, start, start + rows, num_bytes * rows // num_rows)
