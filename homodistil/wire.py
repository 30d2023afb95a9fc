"""What ranks tell each other, as JSON: whoever reaches a job's port can spoil its numbers, but runs no code in it.

    text = encode(value)          # bytes
    value = decode(text)

None, bool, int, float (also NaN and infinite), str, bytes, Path, list, tuple, dict, NumPy arrays of numbers, and the
classes that say so with `@travels` and are known where they arrive. Anything else is a `TypeError` at the sender.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

C = TypeVar("C", bound=type)

_classes: dict[str, type] = {}
_NUMBERS = "biuf"
"""Kinds of NumPy's dtypes whose bytes are their values."""


def travels(kind: C) -> C:
    """Class decorator: instances may be sent. A dataclass, a NamedTuple, a list, or with `to_wire` and `from_wire`."""
    _classes[kind.__name__] = kind
    return kind


def encode(value: Any) -> bytes:
    """JSON (UTF-8) of `value`. Raises `TypeError` for what does not travel."""
    return json.dumps(_plain(value)).encode()


def decode(text: bytes) -> Any:
    """The value that `encode` was given. Raises `ValueError` for what `encode` has not written."""
    try:
        return _value(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of ours ({type(error).__name__}: {error})") from None


def _plain(value: Any) -> Any:
    """Only JSON's own types: an object {tag: content} for everything but null, booleans, numbers, strings and lists."""
    kind = type(value)
    if _classes.get(kind.__name__) is kind:
        return {"class": [kind.__name__, _plain(_fields(value))]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if kind is list:
        return [_plain(item) for item in value]
    return _tagged(value)


def _tagged(value: Any) -> dict[str, Any]:
    if type(value) is tuple:
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": [value.dtype.str, list(value.shape), content]}
    raise TypeError(f"{type(value).__name__} does not travel between ranks; use plain data, or mark it with @travels")


def _fields(value: Any) -> Any:
    if hasattr(value, "to_wire"):
        return value.to_wire()
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value)


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, content),) = plain.items()
    return _READERS[tag](content)


def _instance(content: list) -> Any:
    name, fields = content
    kind, fields = _classes[name], _value(fields)
    if hasattr(kind, "from_wire"):
        return kind.from_wire(fields)
    return kind(fields) if issubclass(kind, list) else kind(*fields)


def _array(content: list) -> np.ndarray:
    dtype, shape, text = content
    if np.dtype(dtype).kind not in _NUMBERS:
        raise ValueError(f"an array of {dtype} does not travel")
    return np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype)).reshape(shape).copy()


_READERS = {
    "tuple": lambda content: tuple(_value(item) for item in content),
    "dict": lambda content: {_value(key): _value(item) for key, item in content},
    "bytes": base64.b64decode,
    "path": Path,
    "array": _array,
    "class": _instance,
}
