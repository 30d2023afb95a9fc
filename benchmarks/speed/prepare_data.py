"""Preparing a corpus: throughput and memory, beside a plain `datasets` script (plain_datasets.py).

    python -m benchmarks.speed.prepare_data --gigabytes 10                    # about 20 minutes, 30 GB of disk
    python -m benchmarks.speed.prepare_data --gigabytes 0.1 --json out.json   # a look

Text: the packaged texts repeated with different orders of their documents. Memory is the sum over all processes of
their share of resident memory, twice per second. Speeds are MB of text per second and core: wall time times workers,
start and merge included. The plain script gets the first `--plain-gigabytes` of the text.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.process import Ran, run
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, parser, publish
from benchmarks.harness.table import table
from homodistil.data.sources import assets

FILE_BYTES, SEQ_LEN = 250_000_000, 64
METRICS = {"wall_s": "s", "megabytes_per_s_core": "MB/s", "megabytes_per_cpu_s": "MB/s", "peak_megabytes": "MB"}


def write_text(folder: Path, num_bytes: int, cache_dir: Path) -> list[Path]:
    """Files of JSON lines with about `num_bytes` in all, streamed to disk."""
    lines = []
    for name in assets.default_texts(cache_dir)[0]:
        lines += assets.text_file(name, cache_dir).read_bytes().splitlines(keepends=True)
    folder.mkdir(parents=True)
    files, written, draw = [], 0, random.Random(0)
    while written < num_bytes:
        files.append(folder / f"part-{len(files):04d}.jsonl")
        with open(files[-1], "wb") as file:
            while file.tell() < FILE_BYTES and written + file.tell() < num_bytes:
                file.writelines(draw.sample(lines, len(lines)))
            written += file.tell()
    return files


def first_files(files: list[Path], gigabytes: float) -> list[Path]:
    """The first files of about that size, at least one."""
    count = 1
    while count < len(files) and total_bytes(files[: count + 1]) <= gigabytes * 1e9 * 1.1:
        count += 1
    return files[:count]


def total_bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Program -> what it took."""
    cache, workers = Path(args.cache_dir).expanduser(), str(args.workers)
    files = write_text(folder / "text", int(args.gigabytes * 1e9), cache)
    teacher = assets.teacher_folder("embedded:bert-tiny", cache)
    fields = {"sources": f"[{','.join(map(str, files))}]", "cache_dir": folder / "ours", "workers": workers}
    fields |= {"shard_bytes": int(args.shard_megabytes * 1e6), "seq_len": SEQ_LEN}
    values = [f"teacher.name={teacher}", *(f"data.{name}={value}" for name, value in fields.items())]
    few = first_files(files, args.plain_gigabytes)
    plain = ["-m", "benchmarks.speed.plain_datasets", str(teacher), str(SEQ_LEN), workers, str(folder / "plain")]
    programs = {
        "homodistil": (files, [str(ROOT / "launcher" / "prepare_data.py"), *values]),
        "plain `datasets` script": (few, [*plain, *map(str, few)]),
    }
    return {
        name: _numbers(run([sys.executable, *arguments], folder / "log", ROOT), total_bytes(of), args.workers)
        for name, (of, arguments) in programs.items()
    }


def _numbers(ran: Ran, num_bytes: int, workers: int) -> dict[str, float]:
    return {
        "gigabytes": num_bytes / 1e9,
        "wall_s": ran.wall_s,
        "megabytes_per_s_core": num_bytes / 1e6 / ran.wall_s / workers,
        "megabytes_per_cpu_s": num_bytes / 1e6 / ran.cpu_s,
        "peak_megabytes": ran.peak_bytes / 1e6,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--gigabytes", type=float, default=10.0, help="of text")
    made.add_argument("--plain-gigabytes", type=float, default=0.25, help="for the plain script")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--shard-megabytes", type=float, default=64.0)
    made.add_argument("--folder", help="for text and corpora (default: the system's folder for such things)")
    made.add_argument("--cache-dir", default="~/.cache/homodistil", help="where packaged text and teacher are kept")
    args = made.parse_args()
    if not (args.gigabytes > 0 and math.isfinite(args.gigabytes)):
        made.error("--gigabytes: expected a number above 0")
    with tempfile.TemporaryDirectory(prefix="prepare_data-", dir=args.folder) as folder:
        results = measure(args, Path(folder))
    rows = Rows("prepare_data", {"workers": args.workers, **environment()})
    for name, numbers in results.items():
        for metric, unit in METRICS.items():
            rows.add(name, metric, unit, numbers["gigabytes"], numbers[metric])
    columns = ["program", "GB {:.2f}", "s {:.0f}", "MB/s per core {:.2f}", "MB per second of processor {:.2f}"]
    columns += ["peak memory of all processes, MB {:.0f}"]
    made = table(columns, [[name, *numbers.values()] for name, numbers in results.items()])
    publish("prepare_data", page(f"Preparing text with {args.workers} workers", made), rows, args)


if __name__ == "__main__":
    main()
