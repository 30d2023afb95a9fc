"""Real text of any size: the packaged texts again and again, each time with another order of the documents."""

from __future__ import annotations

import random
from pathlib import Path

from homodistil.data.sources import assets

FILE_BYTES = 250_000_000


def write_text(folder: Path, num_bytes: int, cache_dir: Path) -> list[Path]:
    """Files of JSON lines with about `num_bytes` in all, streamed to disk."""
    lines = []
    for name in assets.default_texts(cache_dir)[0]:
        lines += assets.text_file(name, cache_dir).read_bytes().splitlines(keepends=True)
    folder.mkdir(parents=True)
    files, written, seed = [], 0, 0
    while written < num_bytes:
        files.append(folder / f"part-{len(files):04d}.jsonl")
        with open(files[-1], "wb") as file:
            while file.tell() < FILE_BYTES and written + file.tell() < num_bytes:
                order = list(range(len(lines)))
                random.Random(seed).shuffle(order)
                file.writelines(lines[index] for index in order)
                seed += 1
            written += file.tell()
        print(f"text: {written / 1e9:.2f} of {num_bytes / 1e9:g} GB", flush=True)
    return files
