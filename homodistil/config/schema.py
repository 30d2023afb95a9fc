"""The typed config of a run: one YAML file plus dotted overrides. The docstrings of fields are the `--help` text.

DeepSpeed's JSON has engine settings only (ZeRO stage, precision, buckets); everything that affects the model is here.
The defaults are the best methods that we have measured (docs/results.md); the method of the paper is a recipe. Each
field declares its metadata (`option.py`): its range, whether it may change on resume, whether the students of one job
share it, and its value in derived runs. Parsing is in `command_line.py`, and rules on several fields are in `rules.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from homodistil.config.option import (
    COMPUTED,
    CONTROL,
    CORRECTION,
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
from homodistil.config.schema_loss import LossConfig
from homodistil.config.schema_method import OptimizerConfig, PruningConfig, TrainConfig

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
    """never: the folder must be new; auto: resume from the last checkpoint if there is one; must: require one."""
    keep_checkpoints: int = option(2, low=1, high=COUNT, resume="free", students="shared", derived=SAME)
    """Number of newest checkpoints to keep (>= 1)."""
    async_checkpoints: bool = option(False, resume="free", students="shared", derived=SAME)
    """Write checkpoints while training continues; needs host memory for one copy of the state of each rank."""
    grow_micro_batch: bool = option(False, resume="free", students="shared", derived=SAME)
    """Increase the micro-batch size as resizing frees memory: same global batch, fewer accumulation steps."""
    rank_timeout_s: float = option(
        1800.0, low=0, high=SECONDS, exclude="low", resume="free", students="shared", derived=SAME
    )
    """Seconds (> 0) without progress after which a rank counts as hung and the job ends; dead ranks are seen sooner."""
    rank_logs: bool = option(False, resume="free", students="own", derived=SAME)
    """Also write the output of each rank to logs/rank-NNNNN.txt in the run folder."""
    report: bool = option(True, resume="free", students="shared", derived=SAME)
    """Write report.html at the end. Without it, `homodistil report` makes the same page at any time."""
    formats: list[Literal["onnx", "onnx-int8", "openvino", "gguf", "gguf-f32", "gguf-q8_0"]] = option(
        [], resume="free", students="shared", derived={CORRECTION: [], MEASUREMENT: [], TRIAL: []}
    )
    """Formats in which every export is written at the end besides the stock checkpoint, as by `homodistil export`. One
    that differs too much from torch is left out with a line; the run and its checkpoint are complete without it."""
    latency: bool = option(
        False, resume="free", students="shared", derived={CORRECTION: False, MEASUREMENT: False, TRIAL: False}
    )
    """Time teacher and exports on this machine's CPU at the end, as `homodistil latency` does with its defaults."""
    trackers: list[Literal["wandb", "mlflow"]] = option(
        [], resume="free", students="shared", derived={CORRECTION: [], MEASUREMENT: [], TRIAL: []}
    )
    """Trackers that get config, values and result besides TensorBoard: Weights & Biases, MLflow. Their own environment
    variables say where; the project or experiment is homodistil unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set.
    One that fails is turned off with a warning; the training neither ends nor waits."""
    export_milestones: list[float] = option(
        [],
        low=0,
        high=1,
        exclude="both",
        resume="fixed",
        students="own",
        derived={CONTROL: [], MEASUREMENT: [], TRIAL: []},
    )
    """Fractions of the teacher's hidden size, in (0, 1). Pruning passes exactly through the stock shape nearest to
    each, and a stock checkpoint with its scores is exported there (family.json)."""
    settle_steps: int = option(
        0, low=0, high=STEPS, resume="fixed", students="own", derived={CONTROL: 0, MEASUREMENT: 0, TRIAL: 0}
    )
    """Optimizer steps (>= 0) for which the widths of a milestone are held before its export; pruning still ends at
    pruning.end_fraction. A milestone with the final widths is exported at the end of training."""
    settle_cooldown: bool = option(True, resume="fixed", students="own", derived=SAME)
    """Let the learning rate fall linearly to 0 during the settle_steps of a milestone, as at the end of a run, which
    improves the exported model. Afterwards it returns to its schedule (train.rewarm_steps smooths the return)."""
    compare: list[Literal["one_shot", "plain_one_shot"]] = option(
        [], resume="free", students="own", derived={MEASUREMENT: [], TRIAL: []}
    )
    """Controls for the result table, trained afterwards with the same data, losses and steps, but pruned before step 0:
    with the compensation of the run (one_shot) or without any (plain_one_shot). Each milestone gets two controls of
    each kind: one whose learning rate falls to 0 within the milestone's steps, and one with the rates of the run."""


@dataclass(kw_only=True)
class RunConfig:
    """All settings of a run except those in DeepSpeed's JSON."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    pruning: PruningConfig = dataclasses.field(default_factory=PruningConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunFolderConfig = dataclasses.field(default_factory=RunFolderConfig)

    given: ClassVar[frozenset[str]] = frozenset()
    """Dotted names of the fields that the user has set; a parsed config has its own."""

    is_settled: ClassVar[bool] = False
    """Whether the teacher has decided on what was left open (training/inputs.py)."""

    def is_set(self, name: str) -> bool:
        """Whether the user has set this field, or a program has given it another value than its default."""
        return name in self.given or value_of(self, name) != value_of(RunConfig(), name)

    def leaves_open(self, name: str) -> bool:
        """Whether the teacher decides on the value of this field, and has not yet."""
        if self.is_settled:
            return False
        needs_lm_head = name in LM_HEAD_WEIGHTS and name not in self.given and value_of(self, name) > 0
        if value_of(self, name) == "auto" or (needs_lm_head and self.data.task in ("auto", *TASKS_WITHOUT_LM_HEAD)):
            return True
        tasks = [task for task, defaults in TASK_DEFAULTS.items() if self.data.task in ("auto", task)]
        is_default = name not in self.given and any(name in TASK_DEFAULTS[task] for task in tasks)
        if name == "pruning.compensation_sequences" and name not in self.given:
            is_default |= self.pruning.schedule in ("auto", "one_shot")
        if name == "pruning.compensation_ridge" and name not in self.given:
            return self.data.task in ("auto", "causal")
        if name in ("teacher.correction_lr", "train.lr", "data.seq_len"):
            return not self.is_set(name)
        if name == "data.short_steps":
            return not (self.is_set(name) or self.is_set("data.seq_len"))
        if name == "data.texts" and name not in self.given:
            return bool(self.data.label_column)
        return is_default or (name == "data.prompt" and bool(tasks))

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


LM_HEAD_WEIGHTS = ("loss.mlm", "loss.kl")
"""Weights of terms over the vocabulary: 0 where the task has no language-modelling head, unless the user set them."""

TASKS_OF_LABELS = ("scores", "token_scores")
"""Values of data.task for models with a head of labels (data/task.py)."""
TASKS_WITHOUT_LM_HEAD = ("none", "embedding", *TASKS_OF_LABELS)
"""Values of data.task for models without a language-modelling head."""

_OF_LABELS = {"loss.scores_kl": 4.0, "loss.scores_mse": 1.0, "loss.labels": 1.0, "pruning.compensation_sequences": 512}
TASK_DEFAULTS = {
    "embedding": {"loss.pooled_cosine": 10.0, "pruning.compensation_sequences": 512},
    **dict.fromkeys(TASKS_OF_LABELS, _OF_LABELS),
}
"""Task -> what its student is given unless the user has set it (the weight: one of those that the task alone has; of
labels the one that suits the teacher's, and that of ground-truth labels where there are any). A text is shorter than a
block of other tasks, and has one vector."""

SECTIONS: dict[str, type] = {section.name: section.default_factory for section in dataclasses.fields(RunConfig)}
"""Name of each section -> its dataclass."""

OPTIONS: dict[str, Option] = {
    f"{name}.{field.name}": option_of(field)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
"""Dotted name of every field (`train.lr`), in the order of the schema -> its metadata."""


def value_of(config: RunConfig, name: str) -> Any:
    """The value of the field with the dotted name `name`."""
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def set_value(config: RunConfig, name: str, value: Any) -> None:
    """Set the field with the dotted name `name` (in place)."""
    section, _, field = name.partition(".")
    setattr(getattr(config, section), field, value)
