"""sha256 of source files, remembered by (path, size, times), so that a cached corpus is recognised without reading."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from homodistil.data.cache import workspace
from homodistil.data.downloads import file_sha256
from homodistil.errors import UserError


def content_hashes(files: list[Path], cache_dir: Path) -> list[str]:
    """Hex sha256 of each file. Raises `UserError` for a file that cannot be read."""
    names = [str(file.resolve()) for file in files]
    label = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    memory = cache_dir / "file_hashes" / f"{label}.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    now = {name: _state(name, known.get(name)) for name in names}
    if now != known:
        with workspace(memory) as folder:
            (folder / "new").write_text(json.dumps(now), encoding="utf-8")
            os.replace(folder / "new", memory)
    return [now[name][-1] for name in names]


def _state(name: str, known: list | None) -> list:
    """[size, mtime_ns, ctime_ns, sha256]; the hash is taken over from `known` when the rest is as it was."""
    try:
        status = os.stat(name)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        return known if known and known[:-1] == state else [*state, file_sha256(Path(name))]
    except OSError as error:
        raise UserError(f"data.sources: cannot read {name!r} ({error.strerror}); check its permissions") from None
