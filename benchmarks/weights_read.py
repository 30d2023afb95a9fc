"""How often the disk is read when all ranks of a machine load the teacher's weights at the same moment.

    python benchmarks/weights_read.py

Weights are mapped (safetensors), so what one process has read from the disk is in the machine's memory for all others.
Processes of their own load a BERT of 6 layers of 768 (random, 268 MB) right after its file has been dropped from
memory; counted is what the kernel fetched from the disk for each (read_bytes of /proc/PID/io).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path

from launch import ROOT

NUM_PROCESSES = (1, 2, 4, 8)
_WEIGHTS = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "weights_read_cpu_202611.md")
    parser.add_argument("--folder", help="on the disk to look at (default: the system's for temporary files)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _write_teacher(Path(folder))
        size = (Path(folder) / _WEIGHTS).stat().st_size
        rows = [(count, read_together(Path(folder), count) / size) for count in NUM_PROCESSES]
    if not all(share for _, share in rows):
        raise SystemExit("nothing was read from a disk: that folder is in memory; choose another with --folder")
    args.out.write_text(_page(size, rows))
    print(_page(size, rows))


def read_together(folder: Path, count: int) -> int:
    """Bytes that came from the disk, for all processes together."""
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(count + 1), context.Queue()
    ready = context.Barrier(count + 1)
    for _ in range(count):
        context.Process(target=_load, args=(folder, ready, start, found)).start()
    ready.wait()
    _drop_from_memory(folder / _WEIGHTS)
    start.wait()
    return sum(found.get() for _ in range(count))


def _load(folder: Path, ready, start, found) -> None:
    from homodistil.distill.teacher import load_model

    ready.wait()
    start.wait()
    before = _bytes_from_disk()
    model = load_model(str(folder))
    assert all(bool(p.detach().isfinite().all()) for p in model.parameters())  # every page is touched
    found.put(_bytes_from_disk() - before)


def _bytes_from_disk() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _drop_from_memory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _write_teacher(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(num_hidden_layers=6)).save_pretrained(folder)


def _page(size: int, rows: list[tuple[int, float]]) -> str:
    lines = ["# Weights read from the disk, CPU (November 2026)", "", "```", __doc__.strip(), "```", ""]
    lines += ["| processes | read from the disk, together, in sizes of the file |", "|--:|--:|"]
    lines += [f"| {count} | {share:.2f} |" for count, share in rows]
    return "\n".join(lines) + f"\n\nFile: {size / 1e6:,.0f} MB.\n"


if __name__ == "__main__":
    main()
