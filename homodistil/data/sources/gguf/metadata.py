"""Fields of a GGUF file's metadata, each refused in one line where it is missing or of another kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from homodistil.data.sources.gguf.container import GgufFile
from homodistil.errors import UserError
from homodistil.models.checkpoint_files import short

_MAX_SIZE = 2**31 - 1
_HOW = "give a file that llama.cpp's convert_hf_to_gguf.py made"
_REQUIRED = object()


def integer(file: GgufFile, key: str, default: Any = _REQUIRED, low: int = 1, high: int = _MAX_SIZE) -> Any:
    """A whole number in [low, high], or `default` where the key is missing."""
    value = _value(file, key, default)
    if value is not default and (type(value) is not int or not low <= value <= high):
        raise _wrong(file, key, value, f"whole numbers {low} .. {high}")
    return value


def positive(file: GgufFile, key: str, default: Any = _REQUIRED) -> float:
    """A number above 0, or `default`. A float32 becomes the shortest decimal that rounds to it: 1e-05."""
    value = _value(file, key, default)
    if value is default:
        return value
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(file, key, value, "numbers above 0")
    return float(str(np.float32(value)))


def text(file: GgufFile, key: str, default: Any = _REQUIRED) -> Any:
    value = _value(file, key, default)
    if value is not default and not isinstance(value, str):
        raise _wrong(file, key, value, "text")
    return value


def flag(file: GgufFile, key: str, default: bool) -> bool:
    value = _value(file, key, default)
    if not isinstance(value, bool):
        raise _wrong(file, key, value, "true and false")
    return value


def texts(file: GgufFile, key: str) -> list[str]:
    return _list(file, key, str, "lists of text")


def integers(file: GgufFile, key: str) -> list[int]:
    return _list(file, key, int, "lists of whole numbers")


def _list(file: GgufFile, key: str, kind: type, allowed: str) -> list:
    value = _value(file, key, _REQUIRED)
    if not isinstance(value, list) or not value or any(type(item) is not kind for item in value):
        raise _wrong(file, key, value, allowed)
    return value


def _value(file: GgufFile, key: str, default: Any) -> Any:
    if key not in file.metadata and default is _REQUIRED:
        raise UserError(f"{file.where}: has no {key} in its metadata; {_HOW}")
    return file.metadata.get(key, default)


def _wrong(file: GgufFile, key: str, value: Any, allowed: str) -> UserError:
    # Of a list no more than what is shown.
    shown = short(repr(value[:20] if isinstance(value, list) else value))
    return UserError(f"{file.where}: found {key} {shown}, allowed are {allowed}; {_HOW}")
