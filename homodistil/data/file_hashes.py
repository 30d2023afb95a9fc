"""sha256 of source files, remembered by (path, size, times), so that a cached corpus is recognised without reading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from homodistil.data.cache import workspace
from homodistil.data.downloads import file_sha256
from homodistil.errors import UserError


def content_hashes(files: list[Path], cache_dir: Path) -> list[str]:
    """Hex sha256 of each file. Raises `UserError` for a file that cannot be read."""
    names = [str(file.resolve()) for file in files]
    label = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    memory = cache_dir / "file_hashes" / f"{label}.json"
    known = _read(memory)
    if not all(_is_as_known(name, known.get(name)) for name in names):
        with workspace(memory) as folder:  # one process reads the files, the others wait for what it finds
            known = _read(memory)
            known = {name: _state(name, known.get(name)) for name in names}
            (folder / "new").write_text(json.dumps(known), encoding="utf-8")
            os.replace(folder / "new", memory)
    return [known[name][-1] for name in names]


def _read(memory: Path) -> dict[str, list]:
    return json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}


def _is_as_known(name: str, known: list | None) -> bool:
    with _readable(name):
        status = os.stat(name)
        return known is not None and known[:-1] == [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _state(name: str, known: list | None) -> list:
    """[size, mtime_ns, ctime_ns, sha256]; the hash is taken over from `known` when the rest is as it was."""
    if _is_as_known(name, known):
        return known
    with _readable(name):
        status = os.stat(name)
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, file_sha256(Path(name))]


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data.sources: cannot read {name!r} ({error.strerror}); check its permissions") from None
