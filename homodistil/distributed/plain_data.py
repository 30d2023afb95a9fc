"""Plain data -> JSON bytes and back, for data sent between ranks: received data is never unpickled.

    encode({"loss": float("nan"), "folder": Path("/runs/a")})     # bytes
    decode(...)                                                   # equal values of the same types

Supports None, bool, int, float (also NaN and infinities), str, bytes, Path, list, tuple and dict (keys of any of these
types), nested to any depth. Convert other types before: a named tuple, for example, to a tuple.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path


def encode(value: object) -> bytes:
    """`value` as JSON bytes. Raises `TypeError` for a type that the module does not support."""
    return json.dumps(_to_json(value)).encode()


def decode(data: bytes) -> object:
    """The inverse of `encode`. Raises `ValueError` for bytes that `encode` has not written."""
    try:
        return _from_json(json.loads(data))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not written by a rank of this job ({type(error).__name__}: {error})") from None


def _to_json(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, dict):
        return {"dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_to_json(item) for item in value]}
    raise TypeError(f"{type(value).__name__} cannot be sent between ranks: pass plain data")


def _from_json(value: object) -> object:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _READERS[kind](content)


_READERS = {
    "bytes": base64.b64decode,
    "path": Path,
    "dict": lambda pairs: {_from_json(key): _from_json(item) for key, item in pairs},
    "tuple": lambda items: tuple(map(_from_json, items)),
}
