"""Reads latency.json of a run folder: how fast its models are on a machine, in each format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from homodistil.metrics.result_table import LATENCY_FILE
from homodistil.report.run import check_size, clean, number


def read_latency(folder: Path, notes: list[str]) -> dict[str, Any]:
    """What `homodistil latency` wrote into a run folder: "tokens", "threads", "rounds" and "rows"; {} without the file.

    Args:
        notes: takes a sentence if the file cannot be read.
    """
    path = folder / LATENCY_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_size(content)
        content = clean(content)
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise ValueError("no object with rows")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{LATENCY_FILE}: cannot be read ({' '.join(str(error).split())[:200]})")
        return {}
    return content


def timed_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model and format (training/latency.py, `Timed`), those with a time alone."""
    return [row for row in content.get("rows", []) if isinstance(row, dict) and number(row.get("ms_per_sentence"))]


def torch_times(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Name of a model in the result table -> milliseconds per sentence in torch."""
    return {str(row.get("checkpoint")): row["ms_per_sentence"] for row in rows if row.get("format") == "torch"}
