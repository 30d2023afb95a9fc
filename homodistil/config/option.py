"""Metadata of a config field besides default and help: allowed values, and its role in resumed and derived runs.

    lr: float = option(3e-3, low=0, high=10, exclude="low", resume="fixed", students="own", derived={CORRECTION: KEY})

The metadata is used by `rules.py` (ranges), `training/run_folder.py` (resuming), `students.py` (several students in one
job) and `derive.py` (runs derived from another one).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Upper bounds are far above useful values, but below values that overflow, never end or exceed the memory.
STEPS = 10**9
"""At 1 ms per step this takes 11 days. Tables of schedules have one entry per event, not per step."""
COUNT = 10**7
"""Sequences, batches, neurons; no machine has memory for more."""
WEIGHT = 10**6
"""Weight of a loss term. In fp32, a term that is smaller by this factor still changes the sum."""
SECONDS = 10**7
"""115 days; below the longest timeout of threading."""
SEED = 2**31 - 1

# -- the runs that are derived from another one (derive.py)

CORRECTION = "correction"
"""The correction of the teacher on the corpus."""
CONTROL = "control"
"""A control: the run pruned in one shot before step 0."""
PLAIN_CONTROL = "plain_control"
"""Additional values of a control without compensation."""
MILESTONE = "milestone"
"""Additional values of the control of a milestone."""
SAME_RATES = "same_rates"
"""Additional values of the control of a milestone that has the learning rates of the run."""
MEASUREMENT = "measurement"
"""A short run whose time and memory per step are measured for a plan."""
MEASUREMENT_INPUTS = "measurement_inputs"
"""Teacher and text of a measurement."""
TRIAL = "trial"
"""A step with one micro-batch per rank, tried by the preflight check."""
CALIBRATION = "calibration"
"""The batches for the statistics of a compensated event."""
STUDENT = "student"
"""One of several students in one job."""
SHARED_JOB = "shared_job"
"""A job with several students."""
JOB_FOLDER = "job_folder"
"""The run folder of such a job; its checkpoints are in the folders of the students."""
_OF_TRAINING = (CORRECTION, CONTROL, PLAIN_CONTROL, MILESTONE, SAME_RATES, CALIBRATION)
_BEFORE_TRAINING = (MEASUREMENT, MEASUREMENT_INPUTS, TRIAL)
DERIVED_RUNS = (*_OF_TRAINING, *_BEFORE_TRAINING, STUDENT, SHARED_JOB, JOB_FOLDER)


class _Marker:
    """A marker that is different from every value of a field."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


COMPUTED = _Marker("COMPUTED")
"""The value in the derived run depends on other fields or on results, and is computed in `derive.py`."""
KEY = _Marker("KEY")
"""The derived run has the same value, and the value is part of its cache key, because the result depends on it."""
COMPUTED_KEY = _Marker("COMPUTED_KEY")
"""Like COMPUTED, and part of the cache key."""
SAME: Mapping[str, Any] = types.MappingProxyType({})
"""All derived runs have the same value as the run: it takes no time there, and does not affect their results."""


class Limits(typing.NamedTuple):
    """An interval of numbers."""

    low: float
    high: float
    exclude: Literal["", "low", "high", "both"] = ""
    """Ends that are not part of the interval."""

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
    """Metadata of one field."""

    limits: Limits | None
    """Range of a number, or of each number in a list or mapping; None: no range."""
    limited_by: str
    """For a field without range: the code that decides which values are allowed, as a note for readers."""
    resume: Literal["fixed", "free", "content"]
    """fixed: a resumed run must have the same value; free: it may have another value, which changes neither the order
    of the data nor, except for rounding, the student; content: it may have another path or name of the same content."""
    students: Literal["shared", "own"]
    """shared: all students of a job must have the value of the job; own: each may have a different value."""
    derived: Mapping[str, Any]
    """Derived run -> value in it: a constant, COMPUTED, KEY or COMPUTED_KEY."""


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
    """A field of a config dataclass. The docstring below the field is its help text.

    Args:
        default: a list or dict is copied for every config.
        low, high, exclude: smallest and largest number, and which of these ends are not allowed.
        limited_by: required for a field that is not a Literal or bool and has no `low` and `high`; see `Option`.
        resume, students, derived: see `Option`. `derived=SAME` if no derived run has another value.
    """
    limits = None if low is None or high is None else Limits(low, high, exclude)
    metadata = {"option": Option(limits, limited_by, resume, students, dict(derived))}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(field: dataclasses.Field) -> Option:
    """The metadata of a field. Raises `TypeError` for a field that was not declared by `option`."""
    if "option" not in field.metadata:
        raise TypeError(f"{field.name}: declare it by homodistil.config.option.option")
    return field.metadata["option"]


def missing_facts(section: type) -> list[str]:
    """Problems in the metadata of the fields of a config dataclass, one line each; empty if there are none."""
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
