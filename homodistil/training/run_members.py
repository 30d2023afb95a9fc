"""The models of a run that can be timed, its teacher and its exports, by their names in the result table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from homodistil.config.derive import STUDENTS_FOLDER
from homodistil.errors import UserError
from homodistil.files import to_json, write_atomically, writing
from homodistil.metrics.result_table import LATENCY_FILE, RESULT_FILE, is_teacher
from homodistil.training.latency import Timed
from homodistil.training.latency_conditions import Conditions
from homodistil.training.run_folder import CONFIG_FILE, EXPORT_FOLDER

Row = dict[str, Any]


class Member(NamedTuple):
    checkpoint: str
    """Folder, hub name or packaged model."""
    label: str
    """Its name in the result table of its run; of other checkpoints the same as `checkpoint`."""
    run: Path | None = None
    """The folder of its run."""


def expand(names: Sequence[str]) -> list[Member]:
    """The checkpoints that are meant: of a run folder its models, any other name as it is.

    Raises:
        UserError: see `members_of`.
    """
    members: list[Member] = []
    for name in names:
        members += members_of(Path(name)) if is_run_folder(Path(name)) else [Member(name, name)]
    return members


def is_run_folder(folder: Path) -> bool:
    """Whether training wrote it. A stock checkpoint has config.json, and no config.yaml."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def members_of(folder: Path) -> list[Member]:
    """The teacher, then the members of the family and the student, as far as they were exported.

    The teacher is the one that the config names: a corrected one has the same architecture. One with fewer pieces
    (student.vocab) is taken from the cache, as long as it is there. Controls are left out, since they have the widths
    of the student.

    Raises:
        UserError: the run has not ended, or files of the folder are damaged.
    """
    if not (folder / RESULT_FILE).is_file():
        raise UserError(f"CHECKPOINT: the run {folder} has no {RESULT_FILE} yet; wait until it has ended")
    rows = [row for row in _read(folder / RESULT_FILE, json.loads, list) if isinstance(row, dict)]
    exports = _exports(folder, rows)
    teacher = next((row for row in rows if is_teacher(row)), {"name": "teacher"})
    first = Member(_teacher(folder, teacher), str(teacher["name"]), folder)
    return [first, *(Member(str(at), name, folder) for name, at in exports.items())]


def _exports(folder: Path, rows: Sequence[Row]) -> dict[str, Path]:
    """Name in the result table -> folder of the stock checkpoint. A student's row precedes those of its controls."""
    exports: dict[str, Path] = {}
    students: set[Any] = set()
    for row in rows:
        if is_teacher(row) or "rates" in row or ("folder" not in row and row.get("student") in students):
            continue
        if "folder" not in row:
            students.add(row.get("student"))
        of_student = Path(STUDENTS_FOLDER, str(row["student"])) if "student" in row else Path()
        export = folder / of_student / str(row.get("folder", EXPORT_FOLDER))
        if (export / "config.json").is_file():
            exports[str(row.get("name"))] = export
    return exports


def _teacher(folder: Path, row: Row) -> str:
    config = _read(folder / CONFIG_FILE, yaml.safe_load, dict)
    teacher, data = config.get("teacher"), config.get("data")
    if "cached_teacher" in row and isinstance(data, dict):
        cached = Path(str(data.get("cache_dir"))).expanduser() / "teachers" / str(row["cached_teacher"])
        if cached.is_dir():
            return str(cached)
    name = teacher.get("name") if isinstance(teacher, dict) else None
    if not isinstance(name, str):
        raise UserError(
            f"CHECKPOINT: {folder / CONFIG_FILE} has no teacher.name; restore the file, or give the exports"
        )
    return name


def _read(path: Path, parse, kind: type) -> Any:
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"found {type(content).__name__}, expected {kind.__name__}")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"CHECKPOINT: {path} cannot be read ({reason}); restore it, or give the exports") from None
    return content


def keep(members: Sequence[Member], rows: Sequence[Timed], conditions: Conditions) -> None:
    """Write the rows of each run to its latency.json, under the names of its result table."""
    for run in dict.fromkeys(member.run for member in members if member.run is not None):
        labels = {member.checkpoint: member.label for member in members if member.run == run}
        of_run = [row._replace(checkpoint=labels[row.checkpoint]) for row in rows if row.checkpoint in labels]
        with writing(run / LATENCY_FILE):
            text = to_json(conditions._asdict() | {"rows": [row._asdict() for row in of_run]})
            write_atomically(run / LATENCY_FILE, f"{text}\n")
