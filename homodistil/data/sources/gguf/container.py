"""A GGUF file: metadata and a table of tensors, behind which the tensors' bytes lie. Every length is checked.

    header: b"GGUF", version, number of tensors, number of metadata entries
    metadata entry: key, type of the value, value       (a string is its length and UTF-8; an array its type and length)
    tensor: name, sizes (the fastest first), type, offset from the beginning of the data

Little-endian. Nothing but the header is read before a tensor is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from homodistil.data.sources.gguf.quantisation import FORMATS, Format
from homodistil.errors import UserError
from homodistil.models.checkpoint_files import short

VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_HEADER = 24
"""Bytes."""
# Types of values.
_SCALARS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_DEPTH = 4
"""Of arrays in arrays; files have them flat."""
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT = "general.alignment", 32
AGAIN = "copy or download the file again"
"""What to do about damage."""


class Entry(NamedTuple):
    """A tensor in the table."""

    shape: tuple[int, ...]
    """As numpy and torch have it: the slowest first."""
    format: Format
    start: int
    """Of its bytes in the file."""
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """Contents of a GGUF file. Tensors are read from a memory map, one at a time."""

    where: str
    """Field and file; begins every message."""
    metadata: dict[str, Any]
    """Numbers, truth values, text and lists of these."""
    tensors: dict[str, Entry]
    content: np.ndarray
    """All bytes (uint8)."""

    def tensor(self, name: str) -> np.ndarray:
        """Its values (float32, in the entry's shape). Raises `UserError` where one is infinite or no number."""
        entry = self.tensors[name]
        packed = self.content[entry.start : entry.start + entry.num_bytes]
        with np.errstate(all="ignore"):
            values = entry.format.unpack(packed).reshape(entry.shape)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.where}: is damaged (tensor {short(name)!r} has values that are not finite); {AGAIN}"
            )
        return values


def read_gguf(path: Path, field: str) -> GgufFile:
    """The header of a file, checked against its size.

    Args:
        field: what the user gave `path` as, for messages: teacher.name.

    Raises:
        UserError: no regular file, not GGUF, another version, cut short or damaged, a quantisation that is not read.
    """
    where = f"{field}: {path}"
    content = _mapped(path, where)
    cursor = _Cursor(content, where)
    num_tensors, num_entries = _begin(cursor, where)
    metadata = dict(_distinct(cursor, num_entries, "metadata entries", cursor.value))
    table = dict(_distinct(cursor, num_tensors, "tensors", cursor.tensor))
    start = _data_start(metadata, cursor.position, where)
    tensors = {name: _placed(name, *row, start, content.size, where) for name, row in table.items()}
    return GgufFile(where, metadata, tensors, content)


class _Cursor:
    """Reads forward, and refuses to read past the end."""

    def __init__(self, content: np.ndarray, where: str) -> None:
        self._content, self.where = content, where
        self.position = 0

    @property
    def left(self) -> int:
        return self._content.size - self.position

    def take(self, num_bytes: int) -> np.ndarray:
        if num_bytes > self.left:
            raise UserError(
                f"{self.where}: is cut short or damaged (at byte {self.position} {num_bytes} more are announced, "
                f"{self.left} are left); {AGAIN}"
            )
        self.position += num_bytes
        return self._content[self.position - num_bytes : self.position]

    def numbers(self, dtype: str, count: int) -> list:
        return self.take(count * np.dtype(dtype).itemsize).view(dtype).tolist()

    def number(self, dtype: str) -> Any:
        return self.numbers(dtype, 1)[0]

    def text(self) -> str:
        start, content = self.position, self.take(self.number("<u8"))
        try:
            return content.tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.where}: is damaged (the text at byte {start} is not UTF-8); {AGAIN}") from None

    def value(self) -> Any:
        return self._value(self.number("<u4"), 0)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MAX_DEPTH:
            return self._array(self.number("<u4"), self.number("<u8"), depth)
        raise UserError(
            f"{self.where}: is damaged (metadata of type {kind} before byte {self.position}, types are 0 .. 12); "
            f"{AGAIN}"
        )

    def _array(self, kind: int, count: int, depth: int) -> list:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], count)
        return [self._value(kind, depth + 1) for _ in range(count)]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """(shape, type, offset)."""
        num_dims = self.number("<u4")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise UserError(
                f"{self.where}: is damaged (a tensor with {num_dims} dimensions before byte {self.position}, allowed "
                f"are 1 .. {_MAX_DIMS}); {AGAIN}"
            )
        sizes = self.numbers("<u8", num_dims)
        return tuple(reversed(sizes)), self.number("<u4"), self.number("<u8")


def _mapped(path: Path, where: str) -> np.ndarray:
    if not path.is_file():  # a pipe would be waited for
        actual = "is not there" if not path.exists() else "is not a regular file"
        raise UserError(f"{where} {actual}; give a GGUF file of a Llama model, a folder or a hub name")
    try:
        size = path.stat().st_size
        return np.asarray(np.memmap(path, np.uint8, "r")) if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); make it readable") from None


def _begin(cursor: _Cursor, where: str) -> tuple[int, int]:
    """(number of tensors, number of metadata entries)."""
    size = cursor.left
    if size < _HEADER or (magic := cursor.take(len(_MAGIC)).tobytes()) != _MAGIC:
        actual = f"{size} bytes" if size < _HEADER else f"it begins with {magic!r}"
        raise UserError(f"{where}: is no GGUF file ({actual}, expected {_MAGIC!r} and a header); {AGAIN}")
    if (version := cursor.number("<u4")) not in VERSIONS:
        raise UserError(
            f"{where}: found GGUF version {version}, allowed are {' and '.join(map(str, VERSIONS))} (little-endian); "
            f"convert the model again with a current llama.cpp"
        )
    return cursor.number("<u8"), cursor.number("<u8")


def _distinct(cursor: _Cursor, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
    """`count` pairs of a name and what `read` finds behind it."""
    if count > cursor.left:  # each needs more than a byte
        raise UserError(f"{cursor.where}: is damaged ({count} {what} in {cursor.left} bytes); {AGAIN}")
    pairs: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in pairs:
            raise UserError(f"{cursor.where}: is damaged ({short(name)!r} twice among the {what}); {AGAIN}")
        pairs[name] = read()
    return pairs


def _data_start(metadata: dict[str, Any], position: int, where: str) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UserError(
            f"{where}: found {_ALIGNMENT_KEY} {short(repr(alignment))}, allowed are powers of 2; convert it again"
        )
    return -(-position // alignment) * alignment


def _placed(
    name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, file_size: int, where: str
) -> Entry:
    if (form := FORMATS.get(kind)) is None:
        known = ", ".join(known.name for known in FORMATS.values())
        raise UserError(
            f"{where}: tensor {short(name)!r} has quantisation type {kind}, read are {known}; convert the model again "
            f"in one of these (llama-quantize IN.gguf OUT.gguf Q8_0, say)"
        )
    num_values, start = math.prod(shape), data_start + offset
    num_bytes = num_values // form.block * form.block_bytes
    if not num_values or shape[-1] % form.block or start + num_bytes > file_size:
        raise UserError(
            f"{where}: is cut short or damaged (tensor {short(name)!r}: {num_bytes} bytes of {form.name} in shape "
            f"{list(shape)} from byte {start}, the file has {file_size}); {AGAIN}"
        )
    return Entry(shape, form, start, num_bytes)
