"""Files of JSON lines that a run continues with: what is kept of them, and what is wrong with them."""

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
    """The object of a line, None where it is none with a step (an int)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def go_on(path: Path, start_step: int, total_steps: int, expected: int | None) -> int:
    """Make `path` what it was at the checkpoint: what came after is logged again, the concluding evaluation included.

    Lines that cannot be read or are there twice are moved to NAME.unreadable. That, and lines that are missing, is told
    in one line each; nothing of it stops a run.

    Args:
        start_step: of the checkpoint; 0: the file starts empty.
        expected: lines that the file had then; None: nobody knows.

    Returns:
        Lines that are kept.
    """
    content = path.read_bytes() if start_step and path.exists() else b""
    kept: dict[object, bytes] = {}
    aside = []
    *lines, last = content.split(b"\n")
    if parse_line(last) is not None:  # else the process was killed while writing it, and it is written again
        lines.append(last)
    for raw in filter(None, lines):
        line = parse_line(raw)
        if line is not None and (line["step"] > start_step or _concludes(line, total_steps)):
            continue
        # A step is logged once of each kind; an event's line is known by all of it.
        key = raw if line is None or "kind" not in line else (line["kind"], line["step"])
        if line is None or key in kept:
            aside.append(raw)
        else:
            kept[key] = raw
    if path.exists():
        write_atomically(path, b"".join(raw + b"\n" for raw in kept.values()))
    _keep_aside(path, aside, start_step)
    if expected is not None and expected != len(kept):
        _warn(f"{path} has {len(kept)} lines up to step {start_step}, the checkpoint knows of {expected}; going on")
    return len(kept)


def _keep_aside(path: Path, lines: list[bytes], start_step: int) -> None:
    if not lines:
        return
    aside = path.with_name(f"{path.name}.unreadable")
    with open(aside, "ab") as file:
        file.write(b"".join(raw + b"\n" for raw in lines))
    _warn(f"{path}: {len(lines)} lines up to step {start_step} cannot be read or are doubled; moved to {aside.name}")


def _concludes(line: Mapping[str, Any], total_steps: int) -> bool:
    return line.get("kind") == "evaluation" and line["step"] == total_steps


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
