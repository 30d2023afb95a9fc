"""Reads any range of elements of a parameter or optimizer state from the shards of a checkpoint, and nothing more."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from homodistil.errors import UserError

WEIGHT = "weight"


class _Part(NamedTuple):
    start: int
    numel: int
    shard: int
    key: str


def key_of(kind: str, name: str, start: int) -> str:
    """Name, inside a shard, of the elements of parameter `name` that begin at `start`."""
    return f"{kind}/{name}/{start}"


class StateReader:
    """The opened shards of one checkpoint, as a context manager. An instance is a `homodistil.resize.ReadState`.

    Args:
        folder: the checkpoint.
        shards: names of its state files.
    """

    def __init__(self, folder: Path, shards: list[str]) -> None:
        self.folder = folder
        self._closing = ExitStack()
        self._shards = [self._closing.enter_context(safe_open(folder / shard, "pt")) for shard in shards]
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        for i, shard in enumerate(self._shards):
            for key in shard.keys():
                kind, name, start = key.split("/")
                numel = shard.get_slice(key).get_shape()[0]
                self._parts.setdefault((kind, name), []).append(_Part(int(start), numel, i, key))
        for parts in self._parts.values():
            parts.sort()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._closing.close()

    @property
    def state_names(self) -> list[str]:
        """Names of the optimizer states in the checkpoint; empty if it was saved before the first step."""
        return sorted({kind for kind, _ in self._parts} - {WEIGHT})

    def check_model(self, sizes: dict[str, int]) -> None:
        """Raise `UserError` unless the checkpoint is of a model with these parameters (name -> elements)."""
        saved = {name: sum(p.numel for p in parts) for (kind, name), parts in self._parts.items() if kind == WEIGHT}
        for name in sorted(saved.keys() | sizes.keys()):
            if saved.get(name) != sizes.get(name):
                raise UserError(
                    f"{self.folder}: holds {saved.get(name, 0)} elements of {name}, this model has "
                    f"{sizes.get(name, 0)}; it is of another model: choose another run.dir"
                )

    def __call__(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of parameter `name`: (stop - start,), on the CPU, in the dtype they were saved in.

        Zeros for an optimizer state that the parameter did not have (at stage 0, if it never had a gradient).

        Raises:
            UserError: elements are missing in the checkpoint.
        """
        parts = self._parts.get((kind, name), [])
        if not parts and kind != WEIGHT:
            return torch.zeros(stop - start)
        pieces = []
        for part in parts:
            first, last = max(start, part.start), min(stop, part.start + part.numel)
            if first < last:
                pieces.append(self._shards[part.shard].get_slice(part.key)[first - part.start : last - part.start])
        whole = torch.cat(pieces) if pieces else torch.zeros(0)
        if len(whole) != stop - start:
            raise UserError(f"{self.folder}: elements of {kind} {name} in [{start}, {stop}) are in no shard")
        return whole
