"""Preparing a corpus: memory, throughput beside a plain `datasets` script, and two kills that change no byte.

    python benchmarks/prepare_data.py --gigabytes 10                    # about 35 minutes on 2 cores, 30 GB of disk
    python benchmarks/prepare_data.py --gigabytes 0.1 --json out.json   # a look

Text: the packaged texts repeated with different orders of their documents. In one run:

* identity: `--identity-gigabytes` of it, once uninterrupted, once killed (kill -9 to the whole process group) at a
  third and at two thirds of the shards and gone on with: every file's sha256 is compared;
* plain: the first files of the same text through `datasets` (preparation/plain_datasets.py), same workers;
* full: all of it, killed twice and gone on with. Its memory is the sum over all processes of their share of resident
  memory, twice a second. `--full-identity` also prepares it uninterrupted and compares; without that, some shards
  are made again from the text and compared with what the manifest says of them.

Speeds are MB of text a second and core: wall time times workers, start and merge included.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

from preparation.jobs import Job, plain_job, remake_shards
from preparation.tables import markdown, rows
from preparation.text import write_text
from report import result_path, write, write_json

from homodistil.data.sources.assets import teacher_folder


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="prepare_data-", dir=options.folder))
    results: dict = {"gigabytes": options.gigabytes, "workers": options.workers, "command": " ".join(sys.argv[1:])}
    try:
        for name, value in _measured(options, folder):
            results[name] = value
            print(f"{name}: {json.dumps(value)}", flush=True)
            _write(options, results)  # now: what has been measured stays, whatever happens to the rest
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not all(results.get(name, True) for name in ("identity_is_equal", "full_is_equal", "remade_shards_are_equal")):
        raise SystemExit("the bytes differ")


def _measured(options: argparse.Namespace, folder: Path):
    """(name, value) of each result, one after the other."""
    cache = Path(options.cache_dir).expanduser()
    teacher = teacher_folder("embedded:bert-tiny", cache)
    files = write_text(folder / "text", int(options.gigabytes * 1e9), cache)
    job = Job(folder, teacher, options.workers, options.shard_megabytes, options.kills)
    small = _first(files, options.identity_gigabytes)
    yield "identity_gigabytes", _size(small) / 1e9
    alone = job.uninterrupted("alone", small)
    yield "alone", alone.result()
    plain_files = _first(files, options.plain_gigabytes)
    yield "plain", {"gigabytes": _size(plain_files) / 1e9, **plain_job(folder, teacher, options.workers, plain_files)}
    killed = job.killed("killed", small)
    yield "killed", killed.result()
    yield "identity_is_equal", alone.checksums == killed.checksums
    alone.delete()
    if small == files:
        full = killed
    else:
        killed.delete()
        full = job.killed("full", files)
        yield "full", full.result()
    yield "remade_shards_are_equal", remake_shards(full, files, teacher, options.remade_shards, folder / "remade")
    full.delete()
    if options.full_identity and small != files:
        yield "full_alone", (again := job.uninterrupted("full_alone", files)).result()
        yield "full_is_equal", again.checksums == full.checksums


def _first(files: list[Path], gigabytes: float) -> list[Path]:
    """The first files of about that size, at least one."""
    count = 1
    while count < len(files) and _size(files[: count + 1]) <= gigabytes * 1e9 * 1.1:
        count += 1
    return files[:count]


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _write(options: argparse.Namespace, results: dict) -> None:
    if options.json:
        write_json(Path(options.json), rows(results))
        return
    write_json(result_path("prepare_data", ".json"), rows(results))
    write(result_path("prepare_data", ".md"), markdown(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of text")
    parser.add_argument("--identity-gigabytes", type=float, default=1.0, help="for the comparison of all files")
    parser.add_argument("--plain-gigabytes", type=float, default=0.25, help="for the plain script")
    parser.add_argument("--full-identity", action="store_true", help="prepare all of it once more, uninterrupted")
    parser.add_argument("--remade-shards", type=int, default=3, help="shards of the full run to make again and compare")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-megabytes", type=float, default=64.0)
    parser.add_argument("--folder", help="for text and corpora (default: the system's folder for such things)")
    parser.add_argument("--cache-dir", default="~/.cache/homodistil", help="where packaged text and teacher are kept")
    parser.add_argument("--json", help="write rows to this file instead of benchmarks/results/")
    options = parser.parse_args()
    if not (options.gigabytes > 0 and math.isfinite(options.gigabytes)):
        parser.error("--gigabytes: expected a number above 0")
    return options


if __name__ == "__main__":
    main()
