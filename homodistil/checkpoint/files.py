"""Writes durable files (hashed while written, then fsynced), and splits nested state into JSON and tensors.

The safetensors format (https://github.com/huggingface/safetensors) is written here tensor by tensor, because the writer
of the library copies everything into one buffer first. Files are read with the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_ALIGNMENT_BYTES = 8


class FileRecord(NamedTuple):
    """Entry of the manifest for one file."""

    num_bytes: int
    sha256: str


class WriteError(Exception):
    """A file could not be written; the message names the file and the reason."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write CPU tensors of any shape as a safetensors file. Raises `WriteError`."""
    # Largest elements first, as the library does: the offset of every tensor is then a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    blocks = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data for name in names)
    return _write(path, [len(text).to_bytes(8, "little"), text], blocks)


def write_json(path: Path, value: object) -> FileRecord:
    """Write `value` as a JSON file. Raises `WriteError`."""
    return _write(path, [json.dumps(value, indent=1).encode() + b"\n"])


def _write(path: Path, *blocks: Iterable[bytes | memoryview]) -> FileRecord:
    digest, num_bytes = hashlib.sha256(), 0
    with _named(path), open(path, "wb") as file:
        for block in (block for part in blocks for block in part):
            digest.update(block)
            num_bytes += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """fsync the folder `path`, so that its new and renamed files survive a power failure. Raises `WriteError`."""
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn OSError into `WriteError` with the path, which the system's message lacks when a write fails half-way."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or error}") from error


def split_tensors(state: Mapping, prefix: str = "") -> tuple[dict, dict[str, Tensor]]:
    """Nested mappings -> (the same without tensors, tensors by their path "a/b/c"). Names must not contain "/"."""
    plain, tensors = {}, {}
    for name, value in state.items():
        assert "/" not in name, name
        if torch.is_tensor(value):
            tensors[prefix + name] = value
        elif isinstance(value, Mapping):
            plain[name], inside = split_tensors(value, f"{prefix}{name}/")
            tensors |= inside
        else:
            plain[name] = value
    return plain, tensors


def join_tensors(plain: dict, tensors: Mapping[str, Tensor]) -> dict:
    """The inverse of `split_tensors`: put `tensors` back into `plain` (in place) and return it."""
    for path, tensor in tensors.items():
        *sections, name = path.split("/")
        place = plain
        for section in sections:
            place = place[section]
        place[name] = tensor
    return plain
