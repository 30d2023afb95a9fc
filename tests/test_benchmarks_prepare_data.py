"""benchmarks/prepare_data.py: its memory and kills on a small command, its tables, and one real run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def benchmarks_importable():
    # Last: a benchmark must not hide a package of the same name.
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_memory_of_all_processes_is_counted(tmp_path):
    from preparation.process import run

    child = "import time; held = bytearray(60_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ran = run([sys.executable, "-c", parent], tmp_path / "log")
    assert 60e6 < ran.peak_unique_bytes <= ran.peak_bytes < 120e6 and not ran.was_killed and ran.cpu_s > 0


def test_a_kill_takes_the_whole_group(tmp_path):
    from preparation.process import run

    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.02)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ran = run([sys.executable, "-c", parent], tmp_path / "log", lambda: beat.exists() and beat.stat().st_size > 3)
    assert ran.was_killed and math.isnan(ran.cpu_s)
    time.sleep(0.2)
    size = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == size
    with pytest.raises(RuntimeError, match=r"failed:\n(.*\n)*no\n"):
        run([sys.executable, "-c", "raise SystemExit('no')"], tmp_path / "log")


@pytest.mark.full
def test_a_real_run(tmp_path, cache_dir):
    command = [sys.executable, str(BENCHMARKS / "prepare_data.py"), "--gigabytes", "0.01", "--shard-megabytes", "1"]
    command += ["--cache-dir", str(cache_dir), "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True)
    found = {(row["variant"], row["metric"]): row["value"] for row in json.loads((tmp_path / "out.json").read_text())}
    assert found["identity_is_equal", "equal"] == found["remade_shards_are_equal", "equal"] == 1
    assert found["killed", "peak_megabytes"] < 2000 and found["plain", "megabytes_per_s_core"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "nothing is left behind"
