"""What is timed: launcher/prepare_data.py on some files, uninterrupted or killed on the way, and the plain script."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from homodistil.files import file_sha256
from preparation.process import Ran, run

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 64
_SAY_EVERY_S = 60.0


@dataclass
class Prepared:
    """One corpus, and the starts that it took."""

    cache: Path
    num_bytes: int
    workers: int
    starts: list[Ran] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    """sha256 of each file of the corpus."""
    manifest: dict = field(default_factory=dict)

    def read(self) -> None:
        """The files as they lie there, against what the manifest says. Raises `ValueError`."""
        (corpus,) = (path.parent for path in self.cache.glob("corpora/*/manifest.json"))
        self.manifest = json.loads((corpus / "manifest.json").read_text())
        self.checksums = {file.name: file_sha256(file) for file in sorted(corpus.iterdir())}
        if not self.manifest["sha256"].items() <= self.checksums.items():
            raise ValueError(f"{corpus}: files are not what manifest.json says")

    def result(self) -> dict:
        wall_s, cpu_s = (sum(getattr(start, name) for start in self.starts) for name in ("wall_s", "cpu_s"))
        return {
            "gigabytes": self.num_bytes / 1e9,
            "starts": len(self.starts),
            "wall_s": wall_s,
            "megabytes_per_s_core": self.num_bytes / 1e6 / wall_s / self.workers,
            "megabytes_per_cpu_s": None if math.isnan(cpu_s) else self.num_bytes / 1e6 / cpu_s,
            "peak_megabytes": max(start.peak_bytes for start in self.starts) / 1e6,
            "peak_unique_megabytes": max(start.peak_unique_bytes for start in self.starts) / 1e6,
            "shards": len(self.manifest["shards"]),
            "blocks": self.manifest["splits"]["train"]["blocks"],
            "train_sha256": self.checksums["train.npy"],
        }

    def delete(self) -> None:
        shutil.rmtree(self.cache)


@dataclass(frozen=True)
class Job:
    """How corpora are prepared."""

    folder: Path
    teacher: Path
    workers: int
    shard_megabytes: float
    kills: int

    def uninterrupted(self, name: str, files: list[Path]) -> Prepared:
        prepared = self._prepared(name, files)
        watch = _Watch(name, prepared.cache)
        prepared.starts.append(run(self._command(prepared, files), self.folder / "log", watch))
        prepared.read()
        return prepared

    def killed(self, name: str, files: list[Path]) -> Prepared:
        """Killed whenever another equal part of the shards is finished, gone on with each time."""
        prepared = self._prepared(name, files)
        num_shards = self._num_shards(files)
        for kill in range(self.kills):
            wanted = max(1, num_shards * (kill + 1) // (self.kills + 1))
            watch = _Watch(name, prepared.cache, wanted)
            ran = run(self._command(prepared, files), self.folder / "log", watch)
            if not ran.was_killed:
                raise RuntimeError(f"{name}: ended before it could be killed; use smaller --shard-megabytes")
            prepared.starts.append(ran)
            print(f"{name}: killed at {len(_finished(prepared.cache))} of {num_shards} shards", flush=True)
        watch = _Watch(name, prepared.cache)
        prepared.starts.append(run(self._command(prepared, files), self.folder / "log", watch))
        prepared.read()
        return prepared

    def _prepared(self, name: str, files: list[Path]) -> Prepared:
        (self.folder / name).mkdir()
        return Prepared(self.folder / name, sum(file.stat().st_size for file in files), self.workers)

    def _num_shards(self, files: list[Path]) -> int:
        """About; one file's are not larger than asked for, and are not shared with the next one's."""
        return sum(math.ceil(file.stat().st_size / (self.shard_megabytes * 1e6)) for file in files)

    def _command(self, prepared: Prepared, files: list[Path]) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "launcher" / "prepare_data.py"),
            f"data.sources=[{','.join(map(str, files))}]",
            f"teacher.name={self.teacher}",
            f"data.cache_dir={prepared.cache}",
            f"data.workers={self.workers}",
            f"data.shard_bytes={int(self.shard_megabytes * 1e6)}",
            f"data.seq_len={SEQ_LEN}",
        ]


def _finished(cache: Path) -> list[Path]:
    return list(cache.glob("parts/*/[0-9]*/summary.json"))


class _Watch:
    """Says whether so many shards are finished, and prints how many every minute."""

    def __init__(self, name: str, cache: Path, wanted: int | None = None) -> None:
        self._name, self._cache, self._wanted = name, cache, wanted
        self._start_s = self._said_s = time.monotonic()

    def __call__(self) -> bool:
        num_finished = len(_finished(self._cache))
        if time.monotonic() - self._said_s > _SAY_EVERY_S:
            self._said_s = time.monotonic()
            print(f"{self._name}: {num_finished} shards after {self._said_s - self._start_s:.0f} s", flush=True)
        return self._wanted is not None and num_finished >= self._wanted


def plain_job(folder: Path, teacher: Path, workers: int, files: list[Path]) -> dict:
    """Seconds and memory of the plain script on the same files."""
    script = Path(__file__).with_name("plain_datasets.py")
    command = [sys.executable, str(script), str(teacher), str(SEQ_LEN), str(workers), str(folder / "plain")]
    ran = run([*command, *map(str, files)], folder / "log")
    shutil.rmtree(folder / "plain")
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return {
        "wall_s": ran.wall_s,
        "megabytes_per_s_core": megabytes / ran.wall_s / workers,
        "megabytes_per_cpu_s": megabytes / ran.cpu_s,
        "peak_megabytes": ran.peak_bytes / 1e6,
    }


def remake_shards(prepared: Prepared, files: list[Path], teacher: Path, count: int, folder: Path) -> bool:
    """Make `count` shards, evenly spread, once more in this process: are they what the killed run's manifest says?"""
    from transformers import AutoTokenizer

    from homodistil.config.schema import DataConfig
    from homodistil.data.prepare.corpus import shards_of

    fields = {"seq_len": SEQ_LEN, "shard_bytes": prepared.manifest["settings"]["shard_bytes"]}
    config = DataConfig(sources=list(map(str, files)), cache_dir=str(prepared.cache), **fields)
    again = shards_of(config, AutoTokenizer.from_pretrained(teacher), folder)
    if again.plan.hash != prepared.manifest["plan"]:
        return False
    expected = prepared.manifest["shards"]
    chosen = sorted({len(expected) * index // count for index in range(count)})
    again.make(chosen, workers=0)
    found = [json.loads((again.shard_folder(index) / "summary.json").read_text()) for index in chosen]
    return found == [expected[index] for index in chosen]
