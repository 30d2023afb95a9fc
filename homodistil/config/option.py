"""Metadata of a config field besides default and help: allowed values, and how it behaves between runs.

    lr: float = option(3e-3, low=0, high=10, exclude="low", resume="fixed", students="own", derived={CORRECTION: KEY})

Each fact stands here once and is read by those who act on it: `rules.py` (ranges), `training/run_folder.py` (resume),
`students.py` (several students in one job) and `derive.py` (a run that is made from another one).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Upper bounds are far above what makes sense, and below what overflows, runs for ever or fills a machine's memory.
STEPS = 10**9
"""A step a millisecond would take 11 days; tables of schedules are as long as events, not as steps."""
COUNT = 10**7
"""Sequences, batches, neurons: more fit no machine."""
WEIGHT = 10**6
"""Weight of a loss term: fp32 still adds a term a million times smaller to about one."""
SECONDS = 10**7
"""115 days, and below what waiting in a thread takes."""
SEED = 2**31 - 1

# -- the runs that are derived from another one (derive.py)

CORRECTION = "correction"
"""The correction of the teacher on the corpus."""
CONTROL = "control"
"""A control: the run cut at once before step 0."""
PLAIN_CONTROL = "plain_control"
"""Further values of a control that cuts without any compensation."""
MILESTONE = "milestone"
"""Further values of a control that belongs to a milestone."""
SAME_RATES = "same_rates"
"""Further values of a milestone's control that has the learning rates of the run itself."""
MEASUREMENT = "measurement"
"""A few steps at some widths, whose time and memory are measured for a plan."""
MEASUREMENT_INPUTS = "measurement_inputs"
"""Teacher and text of a measurement."""
TRIAL = "trial"
"""One step of one micro-batch, before the run itself may start."""
CALIBRATION = "calibration"
"""The batches that a compensated event takes its statistics from."""
STUDENT = "student"
"""One of several students of one job."""
SHARED_JOB = "shared_job"
"""The job of several students, which has no student itself."""
JOB_FOLDER = "job_folder"
"""Its folder, whose checkpoints are in those of the students."""
_OF_TRAINING = (CORRECTION, CONTROL, PLAIN_CONTROL, MILESTONE, SAME_RATES, CALIBRATION)
_BEFORE_TRAINING = (MEASUREMENT, MEASUREMENT_INPUTS, TRIAL)
DERIVED_RUNS = (*_OF_TRAINING, *_BEFORE_TRAINING, STUDENT, SHARED_JOB, JOB_FOLDER)


class _Marker:
    """A value that cannot be mistaken for one of a field."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


COMPUTED = _Marker("COMPUTED")
"""The derived run's value follows from other fields or from results: `derive.py` gives it."""
KEY = _Marker("KEY")
"""The derived run has the run's own value, and its result depends on it: it is part of the key of its cache."""
COMPUTED_KEY = _Marker("COMPUTED_KEY")
"""COMPUTED, and part of the key of its cache."""
SAME: Mapping[str, Any] = types.MappingProxyType({})
"""No derived run needs another value: the field costs no time there, and changes nothing that is asked of it."""


class Limits(typing.NamedTuple):
    """An interval of numbers."""

    low: float
    high: float
    exclude: Literal["", "low", "high", "both"] = ""
    """Ends that are not part of it."""

    def contain(self, value: float) -> bool:
        above = value > self.low if self.exclude in ("low", "both") else value >= self.low
        below = value < self.high if self.exclude in ("high", "both") else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.exclude in ("low", "both") else "["
        right = ")" if self.exclude in ("high", "both") else "]"
        return f"{left}{self.low:.10g}, {self.high:.10g}{right}"


@dataclass(frozen=True)
class Option:
    """The facts about one field."""

    limits: Limits | None
    """Limits of a number, or of each number in a list or mapping."""
    limited_by: str
    """Where no interval is given: what decides which values are allowed."""
    resume: Literal["fixed", "free", "content"]
    """fixed: a resumed run must have the same value; free: it may have another one, which moves neither the order of
    the data nor, beyond rounding, the student; content: it may name the same content at another place."""
    students: Literal["shared", "own"]
    """Whether students of one job must have the job's value, or each has its own."""
    derived: Mapping[str, Any]
    """Derived run -> its value: a constant, COMPUTED, KEY or COMPUTED_KEY."""


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    exclude: Literal["", "low", "high", "both"] = "",
    limited_by: str = "",
    resume: Literal["fixed", "free", "content"],
    students: Literal["shared", "own"],
    derived: Mapping[str, Any],
) -> Any:
    """A field of a config dataclass. What it means stands in the docstring below it, which is the help text.

    Args:
        default: a list or mapping is copied for every config.
        low, high, exclude: smallest and largest number, and which of these ends are not allowed.
        limited_by: for a field that is neither a choice, nor true or false, nor limited by `low` and `high`.
        resume, students, derived: see `Option`. `derived=SAME`: no derived run has another value.
    """
    limits = None if low is None or high is None else Limits(low, high, exclude)
    metadata = {"option": Option(limits, limited_by, resume, students, dict(derived))}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(field: dataclasses.Field) -> Option:
    """Raises `TypeError` for a field without metadata."""
    if "option" not in field.metadata:
        raise TypeError(f"{field.name}: declare it by homodistil.config.option.option")
    return field.metadata["option"]


def missing_facts(section: type) -> list[str]:
    """What is missing in the metadata of the fields of a config dataclass, one line per fact; empty when complete."""
    kinds = typing.get_type_hints(section)
    return [
        f"{field.name}: {problem}"
        for field in dataclasses.fields(section)
        for problem in _problems(kinds[field.name], field.metadata.get("option"))
    ]


def _problems(kind: Any, facts: Option | None) -> list[str]:
    if facts is None:
        return ["is not declared by option(...)"]
    has_choices = kind is bool or Literal in {typing.get_origin(part) for part in (kind, *typing.get_args(kind))}
    problems = []
    if [has_choices, facts.limits is not None, bool(facts.limited_by)].count(True) != 1:
        problems.append("needs one of: choices, low and high, limited_by")
    if unknown := set(facts.derived) - set(DERIVED_RUNS):
        problems.append(f"knows no derived run {', '.join(sorted(unknown))}")
    return problems
