"""benchmarks/speed/prepare_data.py: its memory on a small command, and one real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.process import run

ROOT = Path(__file__).resolve().parents[2]


def test_memory_of_all_processes_is_counted(tmp_path):
    child = "import time; held = bytearray(60_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ran = run([sys.executable, "-c", parent], tmp_path / "log", tmp_path)
    assert 60e6 < ran.peak_unique_bytes <= ran.peak_bytes < 120e6 and ran.cpu_s > 0
    with pytest.raises(RuntimeError, match=r"failed:\n(.*\n)*no\n"):
        run([sys.executable, "-c", "raise SystemExit('no')"], tmp_path / "log", tmp_path)


@pytest.mark.full
def test_a_real_run(tmp_path, cache_dir):
    command = [sys.executable, "-m", "benchmarks.speed.prepare_data", "--gigabytes", "0.01", "--shard-megabytes", "1"]
    command += ["--cache-dir", str(cache_dir), "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, cwd=ROOT)
    found = {(row["variant"], row["metric"]): row["value"] for row in json.loads((tmp_path / "out.json").read_text())}
    assert found["homodistil", "peak_megabytes"] < 2000 and found["plain `datasets` script", "megabytes_per_s_core"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "nothing is left behind"
