"""JSON-lines files of a run (metrics.jsonl, events.jsonl): parsing, and repair when a run resumes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homodistil.files import write_atomically

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if the line is not an object with an integer "step"."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def go_on(path: Path, start_step: int, total_steps: int, expected: int | None) -> int:
    """Restore the log `path` to its state at the checkpoint that a run resumes from.

    Later lines are dropped, because they will be logged again; so is the evaluation at the end of the run. Lines that
    cannot be read or are duplicates are moved to NAME.unreadable. One warning each reports moved and missing lines;
    the run continues.

    Args:
        start_step: step of the checkpoint; 0: the file starts empty.
        total_steps: optimizer steps of the whole run.
        expected: number of lines that the file had at the checkpoint; None: not known.

    Returns:
        Number of lines that are kept.
    """
    content = path.read_bytes() if start_step and path.exists() else b""
    kept: dict[object, bytes] = {}
    aside = []
    *lines, last = content.split(b"\n")
    if parse_line(last) is not None:  # else the process was killed while writing the line, and it will be logged again
        lines.append(last)
    for raw in filter(None, lines):
        line = parse_line(raw)
        if line is not None and (line["step"] > start_step or _concludes(line, total_steps)):
            continue
        # There is one line per kind and step; events have no kind, so only equal lines are duplicates.
        key = raw if line is None or "kind" not in line else (line["kind"], line["step"])
        if line is None or key in kept:
            aside.append(raw)
        else:
            kept[key] = raw
    if path.exists():
        write_atomically(path, b"".join(raw + b"\n" for raw in kept.values()))
    _keep_aside(path, aside, start_step)
    if expected is not None and expected != len(kept):
        _warn(f"{path} has {len(kept)} lines up to step {start_step}, the checkpoint recorded {expected}; continuing")
    return len(kept)


def _keep_aside(path: Path, lines: list[bytes], start_step: int) -> None:
    if not lines:
        return
    aside = path.with_name(f"{path.name}.unreadable")
    with open(aside, "ab") as file:
        file.write(b"".join(raw + b"\n" for raw in lines))
    _warn(f"{path}: {len(lines)} lines up to step {start_step} cannot be read or are duplicates; moved to {aside.name}")


def _concludes(line: Mapping[str, Any], total_steps: int) -> bool:
    return line.get("kind") == "evaluation" and line["step"] == total_steps


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
