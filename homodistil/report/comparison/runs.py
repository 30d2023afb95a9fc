"""Several run folders -> rows for the tables, and curves over one axis.

Runs whose configs differ in nothing but seed, name and folder are seeds of one setting.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homodistil.metrics.result_table import ROW_FILE, is_teacher
from homodistil.metrics.term_labels import term_label
from homodistil.report.curves import (
    TEACHER_STYLE,
    Curve,
    curve,
    final_controls,
    fixed_rows,
    gap,
    teacher_value,
    terms_of,
)
from homodistil.report.figures import Line, Panel
from homodistil.report.latency_file import read_latency, timed_rows, torch_times
from homodistil.report.run import Points, Run, check_size, clean, read_run

GLUE_FILE = Path("glue") / "glue.json"
"""Where `launcher/glue.py --out RUN/glue` writes."""
TEACHER_FILE = "teacher.json"
"""Names the corrected teacher of a run. Written by training/teacher_correction.py, which is too slow to import here."""


@dataclass
class Entry:
    """A run in the comparison."""

    run: Run
    setting: str
    """Identifies the setting: equal for runs that differ in seed, name and folder only."""
    label: str = ""
    """Label of the setting, shared by all its seeds."""
    found: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the result table, unchanged."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The rows under names that distinguish the runs."""
    notes: list[str] = field(default_factory=list)


def read_entries(folders: Sequence[Path]) -> list[Entry]:
    """Read run folders, finished or not; what is missing or damaged becomes a note of the entry.

    Raises:
        UserError: a folder is not a run folder.
    """
    runs = [read_run(Path(folder)) for folder in dict.fromkeys(map(Path, folders))]
    entries = [Entry(run, _setting(run), notes=list(run.notes)) for run in runs]
    _label(entries)
    for entry in entries:
        _add_rows(entry)
        _add_glue(entry)
        _add_latency(entry)
        _note_state(entry)
    return entries


def _setting(run: Run) -> str:
    if not run.config:
        return str(run.folder)
    config = copy.deepcopy({name: section for name, section in run.config.items() if name != "run"})
    if isinstance(config.get("train"), dict):
        config["train"].pop("seed", None)
    return repr((config, run.texts.get("ds_config.json")))


def _label(entries: Sequence[Entry]) -> None:
    """Set the labels: the common beginning of the names of a setting's runs, with a number if two settings share it."""
    taken: dict[str, str] = {}
    for entry in entries:
        names = [other.run.name for other in entries if other.setting == entry.setting]
        folders = [other.run.folder.resolve().name for other in entries if other.setting == entry.setting]
        # `run.name` is often left at the value of the recipe; the folders then distinguish the settings.
        distinct = len({other.run.name for other in entries}) >= len({other.setting for other in entries})
        name = _common(names if distinct else folders)
        label, number = name, 2
        while taken.setdefault(label, entry.setting) != entry.setting:
            label, number = f"{name} ({number})", number + 1
        entry.label = label


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", os.path.commonprefix(list(names))) or names[0]


def _add_rows(entry: Entry) -> None:
    """Take the rows of result.json or, before it exists, of row.json: the student alone, without controls."""
    rows = entry.run.rows
    path = entry.run.folder / ROW_FILE
    if not rows and path.is_file():
        content = _object(path, entry.notes)
        rows = [content] if content else []
    entry.found = list(rows)
    student = _student(rows)
    for row in rows:
        if is_teacher(row):
            # A teacher is one measurement even if several runs used it.
            entry.rows.append({**row, "seed": _teacher_identity(entry.run)})
        else:
            entry.rows.append({**row, "name": _name(entry, row, student), "seed": _seed(entry.run)})


def _name(entry: Entry, row: dict[str, Any], student: dict[str, Any] | None) -> str:
    name = str(row.get("name", "model"))
    if row is student:
        return entry.label
    if _is_on_the_way(row) and "rates" not in row and "student" not in row:
        return f"{entry.label} @ {name.rpartition(' @ ')[2]}"
    return f"{entry.label}: {name}"


def _student(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the final student: the first one that is neither the teacher nor an earlier milestone.

    None if the job had several students: their rows have different names already.
    """
    if any("student" in row for row in rows):
        return None
    return next((row for row in rows if not is_teacher(row) and not _is_on_the_way(row)), None)


def _is_on_the_way(row: Mapping[str, Any]) -> bool:
    """Whether a row is that of a milestone before the last."""
    return "milestone" in row and " @ " in str(row.get("name", ""))


def _seed(run: Run) -> str:
    """Identifies the seed; a run whose seed is unknown counts as a different seed from all other runs."""
    train = run.config.get("train")
    seed = train.get("seed") if isinstance(train, dict) else None
    return str(run.folder.resolve()) if seed is None else f"seed {seed}"


def _teacher_identity(run: Run) -> str:
    """Name of the cached corrected teacher, or that of the teacher's checkpoint if it was not corrected."""
    path, teacher = run.folder / TEACHER_FILE, run.config.get("teacher")
    corrected = _object(path, []).get("corrected") if path.is_file() else None
    return str(corrected or (teacher.get("name") if isinstance(teacher, dict) else run.folder.resolve()))


def _add_glue(entry: Entry) -> None:
    """Add the GLUE score to the student's row: the mean over the tasks of the score of the best setting."""
    path = entry.run.folder / GLUE_FILE
    student = next((row for row in entry.rows if row["name"] == entry.label), None)
    if student is None or not path.is_file():
        return
    tasks = _object(path, entry.notes).get("tasks")
    try:
        scores = [float(task["best"]["score"]) for task in tasks.values()]
        student["glue"] = sum(scores) / len(scores)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        entry.notes.append(f"{GLUE_FILE}: holds no scores")


def _add_latency(entry: Entry) -> None:
    """Add the time of a sentence, in torch, to the rows of models that were timed; of a teacher, too."""
    times = torch_times(timed_rows(read_latency(entry.run.folder, entry.notes)))
    for row, renamed in zip(entry.found, entry.rows, strict=True):
        if (ms := times.get(str(row.get("name")))) is not None:
            renamed["ms_per_sentence"] = ms


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_size(content)
        content = clean(content)
    except (OSError, ValueError, RecursionError) as error:
        content = str(error).splitlines()[0]
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name}: cannot be read ({content if isinstance(content, str) else 'no object'})")
    return {}


def _note_state(entry: Entry) -> None:
    run = entry.run
    missing = [name for name in run.missing if name != "events.jsonl"]
    if missing:
        entry.notes.append(f"{', '.join(missing)} missing")
    if run.total_steps and run.last_step < run.total_steps:
        entry.notes.append(f"stands at step {run.last_step:,} of {run.total_steps:,}")


def run_curves(entries: Sequence[Entry]) -> list[Curve]:
    """Curves of all runs over one axis. Seeds of a setting share colour and dash; only the first one has a label."""
    order = list(dict.fromkeys(entry.setting for entry in entries))

    def lines(points_of) -> list[Line]:
        curves, labelled = [], set()
        for entry in entries:
            if points := points_of(entry.run):
                label = "" if entry.setting in labelled else entry.label
                labelled.add(entry.setting)
                curves.append(Line(label, points, style=order.index(entry.setting)))
        return curves

    def evaluated(name: str) -> list[Line]:
        return lines(lambda run: run.evaluation_points(name))

    def compared(name: str) -> list[Line]:
        return [*evaluated(name), *_control_lines(entries, name, len(order)), *_teacher_lines(entries, name)]

    runs = [entry.run for entry in entries]
    tasks = {run.task for run in runs}
    task = tasks.pop() if len(tasks) == 1 else None
    fixed = f"On held-out {fixed_rows(*runs)}; the teacher on all of them."
    first = "Lines of one kind are seeds of one setting."
    losses = Panel("total", lines(lambda run: run.points("loss/total")), log_when_wide=True)
    terms = [
        Panel(term_label(term, task), lines(lambda run, t=term: run.points(f"loss/{t}")), log_when_wide=True)
        for term in terms_of(*runs)
    ]
    heldout = [Panel(title, compared(name)) for name, title in _HELDOUT.items()]
    distances = [
        Panel(f"{t}, probe batch", evaluated(f"gap/{t}"), log_when_wide=True) for t in ("kl", "hidden", "attention")
    ]
    widths = [
        Panel("hidden size", lines(_hidden), stairs=True, from_zero=True),
        Panel("parameters", lines(lambda run: run.points("model/parameters")), stairs=True, from_zero=True),
    ]
    jumps = [
        Panel(f"{t}, probe batch", lines(lambda run, t=t: _jumps(run, t)), saw_tooth=True) for t in ("kl", "hidden")
    ]
    speed = [Panel("tokens/s", lines(lambda run: run.points("speed/tokens_per_s")), from_zero=True)]
    return [
        curve(
            "Held-out values",
            f"{fixed} {first}",
            heldout,
        ),
        curve("Distance to the teacher", f"Terms on the probe batch at every evaluation. {first}", distances),
        curve("Jump at a resize", "Just before (hollow) and just after (filled) every resize.", jumps),
        curve("Training loss", f"The weighted sum, and every term before its weight. {first}", [losses, *terms]),
        curve("Widths", "Hidden size and parameters of the student.", widths),
        curve("Speed", "Tokens per second over all ranks, without pauses.", speed),
    ]


def _control_lines(entries: Sequence[Entry], name: str, first_style: int) -> list[Line]:
    """Control lines of the first run of every setting; none if they would be too many to see the runs themselves."""
    firsts = [entry for i, entry in enumerate(entries) if entry.setting not in {e.setting for e in entries[:i]}]
    pairs = [(entry, control) for entry in firsts for control in final_controls(entry.run)]
    if len(pairs) > _MOST_CONTROL_LINES:
        return []
    lines = []
    for i, (entry, control) in enumerate(pairs):
        points = entry.run.controls[control].evaluation_points(name)
        lines += [Line(f"{entry.label}: {control}", points, style=first_style + i)] if points else []
    return lines


def _teacher_lines(entries: Sequence[Entry], name: str) -> list[Line]:
    """One level line per teacher, over the steps of all runs."""
    values = {_teacher_identity(entry.run): teacher_value(entry.run, name) for entry in entries}
    known = {identity: value for identity, value in values.items() if value is not None}
    steps = [step for entry in entries for step, _ in entry.run.evaluation_points(name)]
    if not steps:
        return []
    return [Line("teacher", [(min(steps), v), (max(steps), v)], style=TEACHER_STYLE) for v in known.values()]


_MOST_CONTROL_LINES = 6
_HELDOUT = {"mlm_loss": "MLM loss", "lm_loss": "loss", "kl_to_teacher": "KL to teacher", "masked_top1": "masked top-1"}


def _hidden(run: Run) -> Points:
    points = run.points("widths/hidden")
    before = [event.get("widths_before", {}).get("hidden") for event in run.events[:1]]
    steps = [(event["step"], event.get("widths_after", {}).get("hidden")) for event in run.events]
    exact = [(0, before[0]), *steps] if before and before[0] is not None else []
    return sorted(dict([*points, *exact]).items())


def _jumps(run: Run, term: str) -> Points:
    pairs: Points = []
    for event in run.events:
        before, after = gap(event, "gap_before", term), gap(event, "gap_after", term)
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            pairs += [(event["step"], before), (event["step"], after)]
    return pairs
