"""sha256 of source files, cached by path, size and times, so that a known corpus is recognised without reading it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from homodistil.data.cache import workspace
from homodistil.errors import UserError
from homodistil.files import file_sha256

_VERSION = 2  # of the cache files; increase it when their content changes
_SHA256 = 3
"""Index of the hash in an entry."""


def content_hashes(files: list[Path], cache_dir: Path, field: str = "data.sources") -> list[str]:
    """Hex sha256 of each file. Raises `UserError`, which begins with `field`, for a file that cannot be read."""
    names = [str(file.resolve()) for file in files]
    label = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:32]
    memory = cache_dir / "file_hashes" / f"{label}-{_VERSION}.json"
    known = _read(memory, warns=True)
    if not all(_is_as_known(name, known.get(name), field) for name in names):
        with workspace(memory) as folder:  # one process reads the files, the others wait for what it finds
            known = _read(memory)
            known = {name: _state(name, known.get(name), field) for name in names}
            if memory.is_dir():  # damage as well
                shutil.rmtree(memory)
            (folder / "new").write_text(json.dumps(known), encoding="utf-8")
            os.replace(folder / "new", memory)
    return [known[name][_SHA256] for name in names]


def _read(memory: Path, warns: bool = False) -> dict[str, list]:
    """Path -> entry in a cache file, without damaged entries. `warns`: print a warning if there is damage."""
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        good = {name: entry for name, entry in content.items() if _is_sound(name, entry)}
        reason = f"{len(content) - len(good)} of {len(content)} entries" if len(good) < len(content) else None
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        good, reason = {}, type(error).__name__
    if reason and warns:
        print(f"warning: {memory} is damaged ({reason}); made again", file=sys.stderr, flush=True)
    return good


def _is_sound(name: str, entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == _SHA256 + 2 and entry[-1] == _seal(name, entry[:-1])


def _seal(name: str, state: list) -> str:
    """A checksum of an entry, so that a damaged hash is not taken for the hash of another text."""
    return hashlib.sha256(json.dumps([name, state]).encode()).hexdigest()[:16]


def _is_as_known(name: str, known: list | None, field: str) -> bool:
    with _readable(name, field):
        status = os.stat(name)
        return known is not None and known[:_SHA256] == [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _state(name: str, known: list | None, field: str) -> list:
    """[size, mtime_ns, ctime_ns, sha256, seal]; taken over from `known` when the file is as it was."""
    if _is_as_known(name, known, field):
        return known
    with _readable(name, field):
        status = os.stat(name)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, file_sha256(Path(name))]
        return [*state, _seal(name, state)]


@contextlib.contextmanager
def _readable(name: str, field: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{field}: cannot read {name!r} ({error.strerror}); check its permissions") from None
