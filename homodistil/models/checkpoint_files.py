"""A checkpoint's folder and the JSON in it, read so that damage is one line: nothing is built, run or waited for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from homodistil.errors import UserError

_SHOWN = 200
"""Characters of a name that a message repeats."""
_LONGEST_NAME = 4096


def local_folder(name: str, field: str) -> Path | None:
    """The folder that `name` means, None where it can only be a hub name.

    Raises:
        UserError: a path to no folder, or what can be neither.
    """
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(
            f"{field}: found {short(name)!r} ({len(name)} characters), which is no name of a folder or model; give a "
            f"folder with config.json, or a hub name such as bert-base-uncased"
        )
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, no such user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: cannot look at {short(name)!r} ({reason}); give a folder with config.json") from None
    if is_folder:
        return path
    if path.exists() or name.startswith((".", "/", "~")):
        actual = f"{short(name)!r} is a file" if path.exists() else f"no folder {short(name)!r}"
        raise UserError(f"{field}: {actual}; give a folder with config.json, a hub name or embedded:…")
    return None


def read_json(path: Path, field: str, kind: type = dict) -> Any:
    """The object (or, by `kind`, list) in a JSON file. Raises `UserError`: no regular file, unreadable, or broken."""
    how = "give the checkpoint's own file"
    if not path.is_file():  # a pipe would be waited for, a device never ends
        actual = "is not there" if not path.exists() else "is a folder" if path.is_dir() else "is not a regular file"
        raise UserError(f"{field}: {path} {actual}; {how}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and numbers of 5,000 digits are ValueErrors
        raise UserError(f"{field}: {path} is not valid JSON ({first_line(error)}); {how}") from None
    if not isinstance(content, kind):
        wanted = "an object {...}" if kind is dict else "a list [...]"
        raise UserError(f"{field}: {path} holds {type(content).__name__}, expected {wanted}; {how}")
    return content


def short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def first_line(error: Exception) -> str:
    """What a library says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Strict configs name the field in the first line and what is wrong with it in the second.
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else type(error).__name__
    return short(said)
