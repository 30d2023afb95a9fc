"""Where and with what a benchmark ran, and its numbers as files: Markdown for people, rows of JSON for programs."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def row(name: str, variant: str, metric: str, unit: str, x: str | float, values: Sequence[float], config: dict) -> dict:
    """One number: the median of `values`, with their 20th and 80th percentiles."""
    low, middle, high = spread(values)
    return {
        "name": name,
        "variant": variant,
        "metric": metric,
        "unit": unit,
        "x": x,
        "value": middle,
        "p20": low,
        "p80": high,
        "config": config,
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def environment() -> dict[str, str]:
    """Hardware, versions and commit."""
    return {
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def environment_text() -> str:
    return "\n".join(f"* {key}: {value}" for key, value in environment().items())


def result_path(name: str, end: str) -> Path:
    """benchmarks/results/{name}_{cpu or cuda}_{year and month}{end}"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{name}_{device}_{datetime.date.today():%Y%m}{end}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(f"wrote {path}")


def write_json(path: Path, rows: list[dict]) -> None:
    lines = ",\n".join(json.dumps(entry) for entry in rows)
    write(path, f"[\n{lines}\n]")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
