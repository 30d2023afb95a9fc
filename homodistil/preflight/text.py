"""Reads and tokenises some documents of every source, to find problems on which the preparation would fail."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.prepare.corpus import check_tokenizer
from homodistil.data.prepare.packing import framed
from homodistil.data.sources.documents import Span, read, start_of
from homodistil.data.sources.sources import Source, check_sources, unhashed_sources
from homodistil.data.task import Frame
from homodistil.data.tokenizer import check_text_is_known
from homodistil.errors import UserError
from homodistil.preflight.findings import Findings

SAMPLE_DOCUMENTS = 20
SAMPLE_PIECES = 20
"""Pieces read per document, each of at most 16 K characters."""
FILES_LOOKED_INTO = 20


class Sample(NamedTuple):
    """The sample of all sources together."""

    tokens: np.ndarray
    """(N,) int64, without special tokens."""
    num_bytes: int
    """Size on disk of all files of all sources."""


def check_text(findings: Findings, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    """A row per source. The sample, where all of them could be read."""
    backend = findings.attempt("data", lambda: check_tokenizer(config, tokenizer))
    if backend is None:
        return None
    unknown = tokenizer.unk_token_id
    tokens: list[int] = []
    num_bytes = 0
    for name in config.sources:
        sources = findings.attempt("data", lambda name=name: unhashed_sources(config, [name]))
        for source in sources or ():
            ids = findings.attempt("data", lambda source=source: _tokens_of(source, backend, unknown))
            if ids is not None:
                size = sum(file.num_bytes() or 0 for file in source.files)
                num_bytes, tokens = num_bytes + size, tokens + ids
                findings.note("data", f"{source.name}: {_measure(source, size)}, {len(ids):,} tokens read from it")
    if findings.are_good:
        findings.attempt("data", lambda: check_sources(config))
    return Sample(np.asarray(tokens, dtype=np.int64), num_bytes) if findings.are_good else None


def _measure(source: Source, size: int) -> str:
    return f"{len(source.files)} files, {size / 1e6:.1f} MB" if source.files else "hub data set"


def first_documents(source: Source) -> list[Span]:
    """Spans that begin up to FILES_LOOKED_INTO files, spread evenly over the source."""
    step = -(-len(source.files) // FILES_LOOKED_INTO) or 1
    return [start_of(source, index) for index in range(0, max(1, len(source.files)), step)]


def _tokens_of(source: Source, backend: Tokenizer, unknown: int | None) -> list[int]:
    """Tokens of the first documents."""
    spans = first_documents(source)
    share = max(1, SAMPLE_DOCUMENTS // len(spans))
    tokens: list[int] = []
    for span in spans:
        for document in islice(read(source, span), share):
            for piece in islice(document, SAMPLE_PIECES):
                tokens += backend.encode(piece, add_special_tokens=False).ids
    if not tokens:
        raise UserError(f"data.sources: {source.name!r} gave no token of text at its start; put text there")
    check_text_is_known(tokens, unknown, source.name)
    return tokens


def blocks(sample: Sample, frame: Frame, seq_len: int, num_blocks: int) -> np.ndarray:
    """(num_blocks, seq_len) int64 of the sample's tokens in their frame, from its start again when used up."""
    return framed(np.resize(sample.tokens, (num_blocks, frame.body(seq_len))), frame).astype(np.int64)
