"""Several students in one job (`--teachers-once`): each config is that of the job with the fields of a YAML file.

Teacher, text and batches are those of the job. Students may differ in their size, pruning and optimisation (`students`
in the metadata of each field, option.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from homodistil.config.derive import shared_job_config, student_config
from homodistil.config.schema import OPTIONS, RunConfig, value_of
from homodistil.config.shipped import student_files, student_set_names
from homodistil.errors import UserError


def file_names(text: str) -> list[Path]:
    """The paths in the value of `--teachers-once`, such as "small.yaml,tiny.yaml". What is no file may be the name of a
    shipped set of students.

    Raises:
        UserError: there is no path, or two files have the same stem, which names the folder of a student.
    """
    paths = [path for part in text.split(",") if part.strip() for path in _paths(part.strip())]
    if not paths:
        raise UserError(
            f"--teachers-once: found no file; give one per student, as in --teachers-once small.yaml,tiny.yaml, or the "
            f"name of a shipped set ({', '.join(student_set_names())})"
        )
    stems = [path.stem for path in paths]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise UserError(f"--teachers-once: two files are called {twice}, which names a student's folder; rename one")
    return paths


def _paths(name: str) -> list[Path]:
    is_shipped = name in student_set_names() and not Path(name).exists()
    return student_files(name) if is_shipped else [Path(name)]


def as_overrides(content: Mapping[str, Any]) -> list[str]:
    """The content of a YAML file (section -> field -> value) as command-line arguments."""
    return [
        f"--{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, fields in content.items()
        for name, value in (fields or {}).items()
    ]


def finalize_students(
    config: RunConfig, students: Sequence[RunConfig], names: Sequence[str]
) -> tuple[RunConfig, list[RunConfig]]:
    """The final configs of the job and of its students: with their folders, and with whole teacher passes.

    Args:
        students: configs of the students.
        names: their names, which are also the names of their folders.

    Raises:
        UserError: a shared field differs, or the job has a field set that several students do not support.
    """
    _check_together(config)
    for student, name in zip(students, names, strict=True):
        _check_shared(config, student, name)
    finished = [student_config(config, student, name) for student, name in zip(students, names, strict=True)]
    return shared_job_config(config), finished


def _check_together(config: RunConfig) -> None:
    if config.run.grow_micro_batch:
        raise UserError(
            "run.grow_micro_batch: found true, but students of one job share their micro-batches; allowed with "
            "--teachers-once is false"
        )
    if config.student.dropout > 0:
        raise UserError(
            f"student.dropout: found {config.student.dropout:g}, allowed with --teachers-once is 0: what one student "
            f"draws would depend on the others"
        )


def _check_shared(config: RunConfig, student: RunConfig, name: str) -> None:
    for field, facts in OPTIONS.items():
        job_value, value = value_of(config, field), value_of(student, field)
        if facts.students == "shared" and job_value != value:
            raise UserError(
                f"{field}: {value} in {name}.yaml (--teachers-once), and the job has {job_value}; students of one job "
                f"share it: set it for the job alone"
            )


def check_stage(zero_stage: int) -> None:
    """Raise `UserError` for a ZeRO stage that does not support several engines in one job."""
    if zero_stage == 3:
        raise UserError(
            "--teachers-once: zero_optimization.stage 3 in the DeepSpeed JSON has not been tried with several engines; "
            "use stage 0, 1 or 2 (ds_configs/zero2.json)"
        )
