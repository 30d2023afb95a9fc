"""Plain data -> JSON and back, for what travels between ranks: nothing that comes over a wire is ever unpickled.

    encode({"loss": float("nan"), "folder": Path("/runs/a")})     # bytes
    decode(...)                                                   # the same values again, of the same types

None, bool, int, float (NaN and infinities too), str, bytes, Path, list, tuple and dict (keys of any of these types),
nested as one likes. What else has to travel is handed over as these: a named tuple would arrive as a tuple.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path


def encode(value: object) -> bytes:
    """Raises `TypeError` for a type that is not listed above."""
    return json.dumps(_to_json(value)).encode()


def decode(data: bytes) -> object:
    """What `encode` was given. Raises `ValueError` for bytes that it has not written."""
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
    raise TypeError(f"{type(value).__name__} does not travel between ranks: hand over plain data")


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
