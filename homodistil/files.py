"""Atomic writes, strictly valid JSON, sha256 of files, and failed writes as one-line errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from homodistil.errors import UserError


@contextlib.contextmanager
def writing(path: Path, how_to_go_on: str = "with run.resume=auto") -> Iterator[None]:
    """Turn an error while `path` is written (full disk, read-only folder) into a `UserError` that names `path`.

    Args:
        how_to_go_on: end of the message, behind "then run again".
    """
    try:
        yield
    except Exception as error:
        # SafetensorError is recognised by its name, because this module must not import slow libraries.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: cannot be written ({reason}); free disk space or make the folder writable, then run again "
            f"{how_to_go_on}".rstrip()
        ) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically and fsync it: `path` never holds a part. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def to_json(value: Any) -> str:
    """One line of strictly valid JSON: non-finite numbers become null, scalar tensors and arrays become numbers."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float):
        return _plain(value.tolist())  # a tensor, an array, or one of numpy's scalars
    return value if math.isfinite(value) else None


def file_sha256(path: Path) -> str:
    """sha256 of the content of a file, as a hex digest."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
