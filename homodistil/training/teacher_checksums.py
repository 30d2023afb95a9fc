"""Checksums of a teacher that is made in the cache: written last, and looked at before the teacher is used again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from homodistil.data.prepare.integrity import json_object
from homodistil.files import file_sha256, write_atomically

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Write bytes and sha256 of these files, which are in `folder` or below."""
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(files)
    }
    write_atomically(folder / CHECKSUMS_FILE, json.dumps(sums, indent=1) + "\n")


def check_checksums(folder: Path) -> None:
    """Raise ValueError, KeyError, TypeError or OSError where a file is not what was written."""
    for name, record in json_object(folder / CHECKSUMS_FILE).items():
        if (size := (folder / name).stat().st_size) != record["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {record['bytes']}")
        if file_sha256(folder / name) != record["sha256"]:
            raise ValueError(f"{name} has another sha256 than {CHECKSUMS_FILE} says")


def check_weights(folder: Path) -> None:
    """Raise ValueError, OSError or SafetensorError where there are no weights that can be read."""
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError("no weights")
    for path in weights:
        with safe_open(path, "pt"):
            pass


def problem(check: Callable[[], None]) -> str | None:
    """What `check` raises, in words; None: nothing is missing or altered."""
    try:
        check()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
