"""Read a run folder as it is, finished or not. Feeds report/curves.py and report/page.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from homodistil.errors import UserError
from homodistil.metrics import EVENTS_FILE, METRICS_FILE, read_lines
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

    @property
    def name(self) -> str:
        return str(_section(self.config, "run").get("name") or self.folder.resolve().name)

    @property
    def total_steps(self) -> int | None:
        return _section(self.config, "train").get("steps")

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


def read_run(folder: Path) -> Run:
    """Raises `UserError` when `folder` does not exist or holds none of a run's files."""
    if not folder.is_dir():
        raise UserError(f"run folder {folder}: no such folder; name one that training wrote, such as runs/quickstart")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file()}
    if not texts:
        raise UserError(f"run folder {folder}: not a run folder, it holds none of {', '.join(FILES)}")
    lines = read_lines(folder / METRICS_FILE) if METRICS_FILE in texts else []
    return Run(
        folder=folder,
        texts=texts,
        config=_parsed(folder, texts, "config.yaml", yaml.safe_load, yaml.YAMLError) or {},
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "evaluation"],
        events=read_lines(folder / EVENTS_FILE) if EVENTS_FILE in texts else [],
        rows=_parsed(folder, texts, RESULT_FILE, json.loads, json.JSONDecodeError) or [],
    )


def _parsed(folder: Path, texts: dict[str, str], name: str, parse, error: type[Exception]) -> Any:
    try:
        return parse(texts[name]) if name in texts else None
    except error as reason:
        first_line = str(reason).splitlines()[0]
        raise UserError(f"{folder / name}: cannot be read ({first_line}); restore or remove it") from reason


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config.get(name) or {}


def _names(lines: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def _points(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """The last value of a step wins: a job resumed at its very end evaluates that step again."""
    return list({line["step"]: line[name] for line in lines if name in line}.items())
