"""The typed config of a run: one YAML file plus dotted overrides. Field docstrings are the `--help` text.

DeepSpeed's JSON holds engine matters only (ZeRO stage, precision, buckets); everything a model depends on is here.
The defaults of methods are the best that we have measured (docs/results.md); the paper's form is a recipe.
A field says all of itself where it stands (`option.py`): its range, whether it may change on resume, whether the
students of one job share it, and its value in runs that are derived from this one. Parsing lives in `command_line.py`;
the rules that cross fields are in `rules.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from homodistil.config.option import (
    COMPUTED,
    CONTROL,
    COUNT,
    JOB_FOLDER,
    MEASUREMENT,
    MILESTONE,
    SAME,
    SECONDS,
    STEPS,
    STUDENT,
    TRIAL,
    Option,
    option,
    option_of,
)
from homodistil.config.schema_inputs import DataConfig, StudentConfig, TeacherConfig
from homodistil.config.schema_method import LossConfig, OptimizerConfig, PruningConfig, TrainConfig

__all__ = [
    "DataConfig",
    "LossConfig",
    "OptimizerConfig",
    "PruningConfig",
    "RunConfig",
    "RunFolderConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "OPTIONS",
    "SECTIONS",
    "set_value",
    "value_of",
]


@dataclass(kw_only=True)
class RunFolderConfig:
    """run: the run folder"""

    dir: str | None = option(
        None,
        limited_by="training/run_folder.py: new, or this run's",
        resume="free",
        students="own",
        derived={STUDENT: COMPUTED},
    )
    """Run folder. Unset: runs/<run.name>."""
    name: str = option(
        "quickstart",
        limited_by="values.py: one path",
        resume="free",
        students="own",
        derived={CONTROL: COMPUTED, MILESTONE: COMPUTED, STUDENT: COMPUTED},
    )
    """Name of the run, used for the folder and in reports."""
    resume: Literal["never", "auto", "must"] = option(
        "never", resume="free", students="shared", derived={TRIAL: "never", JOB_FOLDER: "auto"}
    )
    """never: the folder must be new; auto: go on from the last checkpoint if there is one; must: insist on one."""
    keep_checkpoints: int = option(2, low=1, high=COUNT, resume="free", students="shared", derived=SAME)
    """Newest checkpoints kept (>= 1)."""
    async_checkpoints: bool = option(False, resume="free", students="shared", derived=SAME)
    """Write checkpoints while training goes on; costs memory for one copy of the state on every rank's host."""
    grow_micro_batch: bool = option(False, resume="free", students="shared", derived=SAME)
    """Let the micro-batch grow into the memory that resizing frees: same global batch, fewer accumulation steps."""
    rank_timeout_s: float = option(
        1800.0, low=0, high=SECONDS, exclude="low", resume="free", students="shared", derived=SAME
    )
    """Seconds (> 0) without progress after which a rank is called stuck and the job ends; dead ones are seen sooner."""
    rank_logs: bool = option(False, resume="free", students="own", derived=SAME)
    """Also keep what each rank says in logs/rank-NNNNN.txt of the run folder."""
    export_milestones: list[float] = option(
        [],
        low=0,
        high=1,
        exclude="both",
        resume="fixed",
        students="own",
        derived={CONTROL: [], MEASUREMENT: [], TRIAL: []},
    )
    """Fractions of the teacher's hidden size, in (0, 1): the widths pass the nearest stock shape of each exactly, and a
    stock checkpoint with its scores is written there (family.json)."""
    settle_steps: int = option(
        0, low=0, high=STEPS, resume="fixed", students="own", derived={CONTROL: 0, MEASUREMENT: 0, TRIAL: 0}
    )
    """Optimizer steps (>= 0) for which a milestone's widths are held before it is exported; pruning still ends at
    pruning.end_fraction. One that has the final widths is exported at the end of training."""
    settle_cooldown: bool = option(True, resume="fixed", students="own", derived=SAME)
    """Let the learning rate fall linearly to 0 while a milestone settles, as it does at the end of a run: what is
    exported is then better. Afterwards it is as without (train.rewarm_steps softens the return)."""
    compare: list[Literal["one_shot", "plain_one_shot"]] = option(
        [], resume="free", students="own", derived={MEASUREMENT: [], TRIAL: []}
    )
    """Controls trained afterwards with the same data, losses and steps, for the result table: cut before step 0, with
    the run's own compensation (one_shot) or without any (plain_one_shot). Each milestone gets its own, twice: with a
    learning rate that falls to 0 within the milestone's steps, and with the run's own rates."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on except the engine's JSON."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    pruning: PruningConfig = dataclasses.field(default_factory=PruningConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunFolderConfig = dataclasses.field(default_factory=RunFolderConfig)

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {section.name: section.default_factory for section in dataclasses.fields(RunConfig)}
"""Name -> dataclass."""

OPTIONS: dict[str, Option] = {
    f"{name}.{field.name}": option_of(field)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
"""Dotted name of every field (`train.lr`), in the order of the schema -> its metadata."""


def value_of(config: RunConfig, name: str) -> Any:
    """Value of the field with this dotted name."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def set_value(config: RunConfig, name: str, value: Any) -> None:
    """Change the field with this dotted name in place."""
    section, _, field = name.partition(".")
    setattr(getattr(config, section), field, value)
