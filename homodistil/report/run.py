"""Reads a run folder, whether the run has finished or not. Used by report/curves.py and report/page.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from homodistil.errors import UserError
from homodistil.metrics.log_files import EVENTS_FILE, METRICS_FILE
from homodistil.metrics.result_table import RESULT_FILE, is_teacher

# File -> when it appears; the page says this while the file is missing.
FILES = {
    "config.yaml": "written when a run starts",
    "ds_config.json": "written when a run starts",
    METRICS_FILE: "written at the first logged step",
    EVENTS_FILE: "written at the first resize",
    RESULT_FILE: "written when a run is complete",
}
_LARGEST = 1e15  # no count and no measurement of a run is larger: such a number comes from a damaged file
_NESTED = ("widths_before", "widths_after", "gap_before", "gap_after")  # parts of a resize event
_MOST_VALUES = 100_000  # of a config or a result table
Points = list[tuple[int, float | None]]
"""(optimizer steps done, value); None where the run logged a value that was not finite."""


@dataclass(frozen=True)
class Run:
    """Everything the page shows. A list or dict is empty if its file is missing or cannot be read."""

    folder: Path
    texts: dict[str, str]
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """Sentences on what could not be read although the run as a whole could (see `read_run`)."""
    controls: dict[str, Run] = field(default_factory=dict)
    """The control runs in the folder `compare` of this run, by name."""

    @property
    def name(self) -> str:
        return clean(str(_section(self.config, "run").get("name") or self.folder.resolve().name))

    @property
    def total_steps(self) -> int | None:
        steps = _section(self.config, "train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def task(self) -> Any:
        """`data.task` of the config; None where it is not there."""
        return _section(self.config, "data").get("task")

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher's row of the result table; {} where there is none (yet)."""
        return next((row for row in self.rows if is_teacher(row)), {})

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens per optimizer step over all ranks (blocks have no padding); None if the config does not say."""
        batch, length = _section(self.config, "train"), _section(self.config, "data")
        sizes = batch.get("global_batch_size"), length.get("seq_len")
        return sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None

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
    """Read a run folder. Files or lines that cannot be read are left out, and `Run.notes` says so.

    Raises:
        UserError: `folder` does not exist, holds none of the files of a run, or none that can be read.
    """
    run = _read(folder)
    controls, notes = {}, list(run.notes)
    for path in sorted(_folders(folder / "compare")):
        try:
            controls[path.name] = control = _read(path)
            notes += [f"compare/{path.name}/{note}" for note in control.notes]
        except UserError as error:
            notes.append(str(error))
    return dataclasses.replace(run, controls=controls, notes=notes)


def number(value: Any) -> float | None:
    """`value` if it is a finite number below 1e15 in size, else None."""
    return value if type(value) in (int, float) and abs(value) < _LARGEST else None


def _folders(folder: Path) -> list[Path]:
    """Folders in `folder` that hold a run."""
    try:
        return [path for path in folder.iterdir() if any((path / name).is_file() for name in FILES)]
    except OSError:
        return []


def _read(folder: Path) -> Run:
    texts = _texts(folder)
    notes: list[str] = []
    lines = [x for x in _lines(texts, METRICS_FILE, notes) if x.get("kind") in ("train", "evaluation")]
    config = _parsed(texts, "config.yaml", yaml.safe_load, dict, notes)
    rows = _parsed(texts, RESULT_FILE, json.loads, list, notes)
    run = Run(
        folder=folder,
        texts=texts,
        config=config or {},
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "evaluation"],
        events=_lines(texts, EVENTS_FILE, notes),
        rows=[row for row in rows or [] if isinstance(row, dict)],
        notes=notes,
    )
    if notes and not (run.config or run.train or run.evaluations or run.events or run.rows):
        raise UserError(f"run folder {folder}: {'; '.join(notes)}; restore these files, or give another folder")
    return run


def _texts(folder: Path) -> dict[str, str]:
    """File -> content. Raises `UserError` if the folder holds none of the files of a run."""
    advice = "give one that training wrote, such as runs/quickstart"
    try:
        if not folder.is_dir():
            what = "found a file" if folder.exists() else "no such folder"
            raise UserError(f"run folder {folder}: {what}; {advice}")
        texts = {name: _text(folder / name) for name in FILES if (folder / name).is_file()}
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL byte
        if isinstance(error, UserError):
            raise
        raise UserError(f"run folder {str(folder)[:200]!r}: {getattr(error, 'strerror', error)}; {advice}") from None
    if not texts:
        raise UserError(f"run folder {folder}: not a run folder, it holds none of {', '.join(FILES)}; {advice}")
    return texts


def _text(path: Path) -> str:
    """Content of a file. Bytes that are not UTF-8 are replaced, so that the rest can be shown."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from None


def _lines(texts: dict[str, str], name: str, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have a step; lines that cannot be read are counted in `notes`.

    An incomplete last line is not counted: the run may be writing it just now.
    """
    written = [line for line in texts.get(name, "").split("\n") if line.strip()]
    parsed = [_line(line) for line in written]
    good = [line for line in parsed if line is not None]
    is_torn = bool(written) and not texts[name].endswith("\n") and parsed[-1] is None
    if lost := len(written) - len(good) - is_torn:
        notes.append(f"{name}: {lost} of {len(written)} lines cannot be read")
    return good


def _line(text: str) -> dict[str, Any] | None:
    """The object of a log line, without values of types that a run never writes; None if the line is not an object."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or number(line["step"]) is None:
        return None
    texts = {name: clean(line[name]) for name in ("kind", "hash") if isinstance(line.get(name), str)}
    nested = {name: _numbers(line[name]) for name in _NESTED if isinstance(line.get(name), dict)}
    plain = {name: value for name, value in line.items() if name not in _NESTED}
    return texts | clean(nested | _numbers(plain))


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    """The numbers in `values`; None for those that were not finite."""
    return {k: number(v) for k, v in values.items() if v is None or type(v) in (int, float)}


def _parsed(texts: dict[str, str], name: str, parse, kind: type, notes: list[str]) -> Any:
    """The parsed file; None if it is missing, empty or damaged. Damage is added to `notes`."""
    try:
        value = parse(texts[name]) if name in texts else None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"found {type(value).__name__}, expected {kind.__name__}")
        check_size(value)
        return clean(value)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        notes.append(f"{name}: cannot be read ({' '.join(str(reason).split())[:200]})")
        return None


def check_size(value: Any) -> None:
    """Raise ValueError if `value` has more than `_MOST_VALUES` items.

    A few lines of YAML whose aliases refer to each other can stand for more items than any memory holds.
    """
    waiting, num_seen = [value], 0
    while waiting:
        item = waiting.pop()
        num_seen += 1
        if num_seen > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values")
        if isinstance(item, (dict, list)):
            waiting += item.values() if isinstance(item, dict) else item


def clean(value: Any) -> Any:
    """A value from JSON or YAML, made safe to show.

    Numbers that are not finite become None, and characters that UTF-8 cannot encode become "?".
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {clean(name): clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return number(value) if type(value) in (int, float) else value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _names(lines: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def _points(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """The last value logged for a step counts: a job that is resumed after its last step evaluates that step again."""
    return list({line["step"]: line[name] for line in lines if name in line}.items())
