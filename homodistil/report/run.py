"""Read a run folder as it is, finished or not. Feeds report/curves.py and report/page.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from homodistil.errors import UserError
from homodistil.metrics import EVENTS_FILE, METRICS_FILE, parse_lines
from homodistil.results import RESULT_FILE

# File -> when it appears; said on the page while it is missing.
FILES = {
    "config.yaml": "written when a run starts",
    "ds_config.json": "written when a run starts",
    METRICS_FILE: "written at the first logged step",
    EVENTS_FILE: "written at the first resize",
    RESULT_FILE: "written when a run is complete",
}
Points = list[tuple[int, float | None]]
"""(optimizer steps done, value); None where the run logged a value that was not finite."""


@dataclass(frozen=True)
class Run:
    """Everything the page shows. Lists are empty and texts None where the file is missing."""

    folder: Path
    texts: dict[str, str]
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """What could not be read, where that is no error (`read_run`, lenient)."""

    @property
    def name(self) -> str:
        return str(_section(self.config, "run").get("name") or self.folder.resolve().name)

    @property
    def total_steps(self) -> int | None:
        steps = _section(self.config, "train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.train + self.evaluations + self.events), default=0)

    @property
    def missing(self) -> list[str]:
        return [name for name in FILES if name not in self.texts]

    def names(self, prefix: str) -> list[str]:
        """Names of training values that start with `prefix`, in the order in which they were first logged."""
        return _names(self.train, prefix)

    def points(self, name: str) -> Points:
        return _points(self.train, name)

    def evaluation_names(self) -> list[str]:
        """Names of held-out values; the count of masked rows never changes and is left out."""
        return [name for name in _names(self.evaluations, "") if name not in ("kind", "step", "masked_rows")]

    def evaluation_points(self, name: str) -> Points:
        return _points(self.evaluations, name)


def read_run(folder: Path, lenient: bool = False) -> Run:
    """Everything of a run folder. Lines that are no log lines (a damaged file) are left out and noted.

    Args:
        lenient: note a config.yaml or result.json that cannot be read, and take it as missing.

    Raises:
        UserError: `folder` does not exist, holds none of a run's files, or one that cannot be read (not lenient).
    """
    if not folder.is_dir():
        raise UserError(f"run folder {folder}: no such folder; name one that training wrote, such as runs/quickstart")
    texts = {name: _text(folder / name) for name in FILES if (folder / name).is_file()}
    if not texts:
        raise UserError(f"run folder {folder}: not a run folder, it holds none of {', '.join(FILES)}")
    notes: list[str] = []
    lines = [x for x in _lines(texts, METRICS_FILE, notes) if x.get("kind") in ("train", "evaluation")]
    parsed = {
        name: _parsed(folder, texts, name, *how, notes if lenient else None)
        for name, how in {
            "config.yaml": (yaml.safe_load, yaml.YAMLError, dict),
            RESULT_FILE: (json.loads, json.JSONDecodeError, list),
        }.items()
    }
    return Run(
        folder=folder,
        texts=texts,
        config=parsed["config.yaml"] or {},
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "evaluation"],
        events=[_event(event) for event in _lines(texts, EVENTS_FILE, notes)],
        rows=[row for row in parsed[RESULT_FILE] or [] if isinstance(row, dict)],
        notes=notes,
    )


def _text(path: Path) -> str:
    """Damaged bytes are replaced: what is around them can be shown."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from None


def _lines(texts: dict[str, str], name: str, notes: list[str]) -> list[dict[str, Any]]:
    """Objects with a step. A torn last line is how a run that is being written looks, and no damage."""
    found = parse_lines(texts.get(name, ""))
    good = [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]
    num_written = len(texts.get(name, "").rstrip("\n").splitlines())
    torn = name in texts and not texts[name].endswith("\n") and num_written > len(found)
    if lost := num_written - len(good) - torn:
        notes.append(f"{name}: {lost} of {num_written} lines cannot be read")
    return good


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """Without parts of another form than a resize writes."""
    nested = ("widths_before", "widths_after", "gap_before", "gap_after")
    return {name: value for name, value in event.items() if name not in nested or isinstance(value, dict)}


def _parsed(folder: Path, texts: dict[str, str], name: str, parse, error: type[Exception], kind: type, notes) -> Any:
    """None where the file is missing, empty, or (with `notes`) damaged."""
    try:
        value = parse(texts[name]) if name in texts else None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"found {type(value).__name__}, expected {kind.__name__}")
        return value
    except (error, ValueError, RecursionError) as reason:
        first_line = str(reason).splitlines()[0]
        if notes is None:
            raise UserError(f"{folder / name}: cannot be read ({first_line}); restore or remove it") from reason
        notes.append(f"{name}: cannot be read ({first_line})")
        return None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _names(lines: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def _points(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """The last value of a step wins: a job resumed at its very end evaluates that step again."""
    return list({line["step"]: line[name] for line in lines if _is_value(line.get(name, ""))}.items())


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))
