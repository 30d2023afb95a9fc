"""Makes one shard: text -> a folder of tokens with a summary of counts and checksums, published atomically.

NNNNN/tokens.bin       token ids of all documents, one after the other
NNNNN/documents.npy    one row of dtype DOCUMENT per document
NNNNN/texts.bin        where texts are sentences: tokens of each text, uint32
NNNNN/labels.bin       with data.label_column: (documents, W) float32 (labels.py), or (tokens,) (token_labels.py)
NNNNN/signatures.bin   with data.near_duplicates: (documents, NUM_HASHES) uint32
NNNNN/summary.json     counts, and size and sha256 of each file
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from homodistil.data.prepare.filters import HEAD_CHARS, Filters
from homodistil.data.prepare.pairs import PairRule
from homodistil.data.prepare.shard_plan import Plan, Shard
from homodistil.data.prepare.texts import TextRule
from homodistil.data.prepare.token_labels import AnyLabelRule, TokenLabelRule, WordLabels
from homodistil.data.sources.documents import Piece, read
from homodistil.data.sources.labelled import read_labelled
from homodistil.data.sources.sources import Source
from homodistil.files import file_sha256

TOKENS, DOCUMENTS, SIGNATURES, SUMMARY = "tokens.bin", "documents.npy", "signatures.bin", "summary.json"
TEXTS, TEXT_LENGTH = "texts.bin", np.dtype("<u4")
LABELS, LABEL = "labels.bin", np.dtype("<f4")
DOCUMENT = np.dtype([("hash", "<u8"), ("num_tokens", "<i8"), ("num_bytes", "<i8"), ("dropped_by", "u1")])
# Limits the memory: the objects of the tokenizer need about 100 bytes per token.
_BATCH_PIECES, _BATCH_CHARS = 4096, 1 << 20


class Recipe(NamedTuple):
    """How every shard of a corpus is made."""

    sources: list[Source]
    tokenizer: Tokenizer
    """The fast tokenizer without truncation and padding."""
    filters: Filters
    texts: TextRule | PairRule | None = None
    """Where every block holds one text or pair: what that is."""
    labels: AnyLabelRule | None = None
    """Where every document has a label, or none by its own account: what that is."""

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.get_vocab_size() < 1 << 16 else "<i4")


class CorpusShards(NamedTuple):
    """The shards of a corpus (a `build_shards.ShardMaker`)."""

    plan: Plan
    recipe: Recipe
    what = "tokenising"
    unit = "B"

    @property
    def sizes(self) -> list[int]:
        """Bytes of text."""
        return [shard.num_bytes for shard in self.plan.shards]

    def make(self, folder: Path, index: int, advance: Callable[[int], None]) -> None:
        make_shard(folder, self.plan.shards[index], self.recipe, advance)

    def damage(self, folder: Path, _index: int, with_checksums: bool = False) -> str | None:
        return damage(folder, with_checksums)


def make_shard(folder: Path, shard: Shard, recipe: Recipe, advance: Callable[[int], None]) -> None:
    """Write a shard to `folder`, which must not exist yet. The caller holds the lock of the shard.

    Args:
        advance: called repeatedly with the bytes of text tokenised since the last call.

    Raises:
        UserError: a source cannot be read.
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process, as the caller holds the lock
    scratch.mkdir(parents=True)
    writer = _Writer(scratch, recipe, advance)
    for span in shard.spans:
        if recipe.labels is None:
            for pieces in read(recipe.sources[shard.source], span):
                writer.add_document(pieces)
        else:
            for pieces, label in read_labelled(recipe.sources[shard.source], span):
                writer.add_document(pieces, recipe.labels.read(label))
    writer.close()
    os.replace(scratch, folder)


def damage(folder: Path, with_checksums: bool = False) -> str | None:
    """What is missing, truncated or (only with checksums) changed in a finished shard; None if nothing is."""
    try:
        files = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["files"]
        if not {TOKENS, DOCUMENTS} <= files.keys():
            return f"{SUMMARY} lacks files"
        for name, expected in files.items():
            if (size := os.stat(folder / name).st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if with_checksums and file_sha256(folder / name) != expected["sha256"]:
                return f"{name} has another sha256 than {SUMMARY} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SUMMARY}: {' '.join(str(error).split())}"
    return None


class _Writer:
    """Writes documents to the files of a shard, in batches of pieces."""

    def __init__(self, folder: Path, recipe: Recipe, advance: Callable[[int], None]) -> None:
        self._folder, self._dtype, self._filters, self._advance = folder, recipe.token_dtype, recipe.filters, advance
        self._tokenizer, self._rule, self._has_labels = recipe.tokenizer, recipe.texts, recipe.labels is not None
        self._of_words: list[WordLabels] | None = [] if isinstance(recipe.labels, TokenLabelRule) else None
        """Labels of the texts that wait to be tokenised, where these are labels of words."""
        self._tokenizer.encode_special_tokens = True  # "[MASK]" in a text becomes three ordinary tokens
        self._files = {name: _HashedFile(folder / name) for name in self._names()}
        self._rows = array("Q"), array("q"), array("q"), array("B")
        self._texts: list[str] = []
        self._owners: list[int] = []
        self._chars = self._bytes = 0

    def _names(self) -> list[str]:
        more = {SIGNATURES: self._filters.near_duplicates, TEXTS: self._has_texts, LABELS: self._has_labels}
        return [TOKENS, *(name for name, is_wanted in more.items() if is_wanted)]

    @property
    def _has_texts(self) -> bool:
        """Whether texts are shorter than documents, and end where tokens do not tell."""
        return isinstance(self._rule, TextRule) and self._rule.unit == "sentence"

    def _parts(self, piece: Piece, is_first: bool) -> Iterable[str]:
        """What of a piece of a document is tokenised as one."""
        return self._rule.parts(piece, is_first) if isinstance(self._rule, TextRule) else [piece]

    def add_document(self, pieces: Iterable[Piece], label: Sequence[float] | WordLabels = ()) -> None:
        """Add a document, with its label where labels are read; one that consists of white space only is ignored. One
        with labels of words is one piece."""
        hashes, num_tokens, num_bytes, dropped_by = self._rows
        number, digest, size, head = len(hashes), hashlib.blake2b(digest_size=8), 0, _Head(self._filters)
        for piece in pieces:
            if piece.strip():
                encoded = piece.encode("utf-8", "surrogatepass")
                digest.update(encoded)
                head.add(piece)
                parts = self._parts(piece, is_first=not size)
                size += len(encoded)
                self._bytes += len(encoded)
                if self._of_words is not None:
                    self._of_words.append(label)
                for part in parts:
                    self._add_part(number, part)
        if not size:
            return
        hashes.append(int.from_bytes(digest.digest(), "little"))
        num_bytes.append(size)
        dropped_by.append(self._filters.judge(head.text()))
        if self._has_labels and self._of_words is None:
            self._files[LABELS].write(np.array(label, dtype=LABEL).tobytes())
        if self._filters.near_duplicates:
            self._files[SIGNATURES].write(self._filters.signature(head.text()).tobytes())

    def _add_part(self, document: int, part: Piece) -> None:
        self._owners.append(document)
        self._texts.append(part)
        self._chars += len(part)
        is_whole = not isinstance(self._rule, PairRule) or len(self._texts) % 2 == 0
        if is_whole and (self._chars >= _BATCH_CHARS or len(self._texts) >= _BATCH_PIECES):
            self._tokenize()

    def _tokenize(self) -> None:
        num_tokens = self._rows[1]
        encodings = self._encodings()
        for owner, ids in zip(self._owners, self._ids_of_parts([encoding.ids for encoding in encodings]), strict=True):
            num_tokens.extend([0] * (owner + 1 - len(num_tokens)))
            num_tokens[owner] += len(ids)
            self._files[TOKENS].write(np.array(ids, dtype=self._dtype).tobytes())
            if ids and self._has_texts:
                self._files[TEXTS].write(np.array(len(ids), dtype=TEXT_LENGTH).tobytes())
        self._advance(self._bytes)
        self._texts, self._owners, self._chars, self._bytes = [], [], 0, 0

    def _encodings(self) -> list[Encoding]:
        """Encodings of the texts that wait. Where words have labels, those of the tokens are written to the file."""
        if self._of_words is None:
            return self._tokenizer.encode_batch_fast(self._texts, add_special_tokens=False)
        encodings = self._tokenizer.encode_batch(self._texts, add_special_tokens=False)
        for labels, encoding in zip(self._of_words, encodings, strict=True):
            row = labels.of_tokens(encoding.offsets, len(self._rule.lead))
            self._files[LABELS].write(row.astype(LABEL).tobytes())
        self._of_words = []
        return encodings

    def _ids_of_parts(self, parts: list[list[int]]) -> Iterable[list[int]]:
        """What is written of the token ids of each part. A pair's two texts are never in two batches."""
        if not isinstance(self._rule, PairRule):
            return parts
        return (ids for i in range(0, len(parts), 2) for ids in self._rule.joined(*parts[i : i + 2]))

    def close(self) -> None:
        if self._texts:
            self._tokenize()
        documents = np.zeros(len(self._rows[0]), dtype=DOCUMENT)
        for name, column in zip(DOCUMENT.names, self._rows, strict=True):
            documents[name] = column
        self._files[DOCUMENTS] = _HashedFile(self._folder / DOCUMENTS)
        np.lib.format.write_array(self._files[DOCUMENTS], documents)
        summary = {
            "documents": len(documents),
            "bytes": int(documents["num_bytes"].sum()),
            "tokens": int(documents["num_tokens"].sum()),
            "files": {name: file.close() for name, file in sorted(self._files.items())},
        }
        with open(self._folder / SUMMARY, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


class _Head:
    """The start of a document, up to the length that filters use."""

    def __init__(self, filters: Filters) -> None:
        self._left = HEAD_CHARS if filters.are_any else 0
        self._pieces: list[str] = []

    def add(self, piece: Piece) -> None:
        if self._left > 0:
            self._pieces.append(piece[: self._left])
            self._left -= len(piece)

    def text(self) -> str:
        return "".join(self._pieces)


class _HashedFile:
    """A file that is written sequentially, with its size and sha256."""

    def __init__(self, path: Path) -> None:
        self._file, self._sha256, self._num_bytes = open(path, "wb"), hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._num_bytes += len(content)

    def close(self) -> dict:
        """fsync and close the file. Returns its size and sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}
