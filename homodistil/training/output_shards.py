"""Files of a teacher's outputs: shards, and the rows that they become, each with its checksums.

<cache_dir>/parts/outputs-<key>/NNNNN/     a shard: rows.npy (texts, D) fp32, checksums.json
<cache_dir>/teacher_outputs/<key>/         train.npy, heldout.npy (texts, D) fp32, outputs.json, checksums.json
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from homodistil.data.prepare.integrity import json_object
from homodistil.distributed.fault_injection import fault_point
from homodistil.files import write_atomically
from homodistil.training.teacher_checksums import CHECKSUMS_FILE, check_checksums, problem, write_checksums

FACTS_FILE, _ROWS_FILE = "outputs.json", "rows.npy"


class OutputShard(NamedTuple):
    """Texts `first` .. `end` - 1 of a split."""

    split: str
    first: int
    end: int


class OutputShards:
    """The shards of a teacher's outputs (a `data.prepare.build_shards.ShardMaker`).

    Args:
        num_texts: by split.
        shard_texts: texts of a shard; the last one of a split may have fewer.
        compute: the teacher's pooled states of the texts of a shard, fp32 (texts, D).
    """

    what, unit = "computing the teacher's outputs", " texts"

    def __init__(
        self, num_texts: Mapping[str, int], shard_texts: int, compute: Callable[[OutputShard], np.ndarray]
    ) -> None:
        self.num_texts, self._shard_texts, self._compute = num_texts, shard_texts, compute

    @functools.cached_property
    def shards(self) -> list[OutputShard]:
        step = self._shard_texts
        return [
            OutputShard(split, first, min(first + step, num_texts))
            for split, num_texts in self.num_texts.items()
            for first in range(0, num_texts, step)
        ]

    @property
    def sizes(self) -> list[int]:
        """Texts."""
        return [shard.end - shard.first for shard in self.shards]

    def make(self, folder: Path, index: int, advance: Callable[[int], None]) -> None:
        scratch = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process, as the caller holds the lock
        scratch.mkdir(parents=True)
        np.save(scratch / _ROWS_FILE, self._compute(self.shards[index]))
        write_checksums(scratch, [scratch / _ROWS_FILE])
        fault_point("outputs.shard_written")
        os.replace(scratch, folder)
        advance(self.sizes[index])

    def damage(self, folder: Path, index: int, with_checksums: bool = False) -> str | None:
        """Checksums are looked at in any case: reading a shard takes no time beside making it."""
        return problem(lambda: _check_rows(folder, {_ROWS_FILE: self.sizes[index]}))

    def merge(self, folder: Path, parts: Sequence[Path], facts: Mapping[str, object]) -> None:
        """Fill `folder` with the rows of all shards, in their order, and with `facts` (FACTS_FILE)."""
        for split, num_texts in self.num_texts.items():
            of_split = [part for shard, part in zip(self.shards, parts, strict=True) if shard.split == split]
            _join(folder / f"{split}.npy", num_texts, of_split)
        write_atomically(folder / FACTS_FILE, json.dumps(dict(facts), indent=1) + "\n")
        write_checksums(folder, folder.iterdir())

    def whole_damage(self, folder: Path) -> str | None:
        """What is missing or altered in a folder of `merge`; None: nothing. Reads all of it."""
        return problem(
            lambda: _check_rows(folder, {f"{split}.npy": num for split, num in self.num_texts.items()}, FACTS_FILE)
        )


def _join(path: Path, num_texts: int, parts: Sequence[Path]) -> None:
    with open(path, "wb") as file:
        for part in parts:
            rows = np.load(part / _ROWS_FILE)
            if not file.tell():
                header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (num_texts, rows.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(rows).data)
        file.flush()
        os.fsync(file.fileno())


def _check_rows(folder: Path, num_texts: Mapping[str, int], *more: str) -> None:
    """Raise as `check_checksums` where a file is not what was written, or does not hold so many rows of fp32."""
    if set(json_object(folder / CHECKSUMS_FILE)) != {*num_texts, *more}:
        raise ValueError(f"{CHECKSUMS_FILE} lists other files than {', '.join((*num_texts, *more))}")
    check_checksums(folder)
    for name, num in num_texts.items():
        rows = np.load(folder / name, mmap_mode="r")
        if rows.ndim != 2 or len(rows) != num or rows.dtype != np.float32:
            raise ValueError(f"{name} holds {rows.shape} of {rows.dtype}, expected {num} rows of float32")
