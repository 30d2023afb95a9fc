"""Run configs that are derived from another one: teacher correction, controls, a measurement, a trial step.

Each field declares its value in derived runs in the schema (`option.py`), so that this is decided where a field is
added. Values that depend on other fields or on results are computed here. No function changes its arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from homodistil.config.option import (
    CALIBRATION,
    COMPUTED,
    COMPUTED_KEY,
    CONTROL,
    CORRECTION,
    JOB_FOLDER,
    KEY,
    MEASUREMENT,
    MEASUREMENT_INPUTS,
    MILESTONE,
    PLAIN_CONTROL,
    SAME_RATES,
    SHARED_JOB,
    STUDENT,
    TRIAL,
)
from homodistil.config.schema import OPTIONS, RunConfig, set_value, value_of

# The teacher must not have seen the batches of the student with the same masks (costs about 0.05 MLM loss).
SEED_OFFSET = 7919
NUM_EVENTS = 3
"""Number of resize events of a measurement."""
STEPS_A_WIDTH = 6
"""Steps of a measurement between two resize events."""
STUDENTS_FOLDER = "students"
"""Folder in the run folder of a job that contains the run folders of its students."""


def derive(config: RunConfig, run: str, computed: Mapping[str, Any] | None = None) -> RunConfig:
    """A copy of `config` with the values that fields declare for a derived run.

    Args:
        run: one of `option.DERIVED_RUNS`.
        computed: dotted name -> value of exactly the fields that declare COMPUTED or COMPUTED_KEY.

    Raises:
        ValueError: `computed` has other names.
    """
    computed = computed or {}
    declared = {name: facts.derived[run] for name, facts in OPTIONS.items() if run in facts.derived}
    expected = {name for name, value in declared.items() if value is COMPUTED or value is COMPUTED_KEY}
    if computed.keys() != expected:
        raise ValueError(f"{run}: fields declare {sorted(expected)} as computed, given are {sorted(computed)}")
    derived = copy.deepcopy(config)
    for name, value in declared.items():
        if value is not KEY:
            set_value(derived, name, copy.deepcopy(computed.get(name, value)))
    return derived


# -- the teacher's correction


def correction_config(config: RunConfig) -> RunConfig:
    """The config of the teacher correction: the same data, the MLM loss alone, and `teacher.correction_*`."""
    teacher = config.teacher
    computed = {"steps": teacher.correction_steps, "lr": teacher.correction_lr}
    computed |= {"seed": teacher.correction_seed + SEED_OFFSET}
    return derive(config, CORRECTION, {f"train.{name}": value for name, value in computed.items()})


def correction_key(config: RunConfig) -> dict[str, Any]:
    """Field -> value of all fields that the corrected teacher depends on; those of the optimizer in a nested mapping.

    It is the key of caches on disk, which another form of the key would invalidate.
    """
    correction, key = correction_config(config), {"optimizer": {}}
    for name, facts in OPTIONS.items():
        if facts.derived.get(CORRECTION) in (KEY, COMPUTED_KEY):
            section, _, field = name.partition(".")
            (key["optimizer"] if section == "optimizer" else key)[field] = value_of(correction, name)
    return key


# -- controls


def control_config(config: RunConfig, name: str) -> RunConfig:
    """The config of a control, which is pruned in one shot before step 0.

    Args:
        name: "one_shot", or "plain_one_shot" for a control without compensation.
    """
    control = derive(config, CONTROL, {"run.name": name})
    return derive(control, PLAIN_CONTROL) if name == "plain_one_shot" else control


def milestone_control_config(config: RunConfig, name: str, folder: str, record: Mapping[str, Any]) -> RunConfig:
    """`control_config` with the widths and the steps of a milestone; the learning rate falls to 0 over these steps.

    Args:
        folder: name of the control and its folder.
        record: the record of the milestone (training/milestone_exports.py).
    """
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    computed = {"run.name": folder, "train.steps": record["step"]} | {f"student.{size}": record[size] for size in sizes}
    return derive(control_config(config, name), MILESTONE, computed)


def with_rates_of(control: RunConfig, config: RunConfig, so_far: Sequence[Mapping[str, Any]]) -> RunConfig:
    """The control of a milestone with the learning rates of the first steps of `config`, including cool-downs.

    Args:
        control: from `milestone_control_config`.
        so_far: records of the milestones up to and including this one.
    """
    train, settle_steps = config.train, config.run.settle_steps
    cools = config.run.settle_cooldown and settle_steps
    cool_from = [*train.cool_from, *(record["step"] - settle_steps for record in so_far if cools)]
    computed = {
        "train.lr_steps": train.lr_steps or train.steps,
        "train.cool_from": cool_from,
        "train.cool_steps": settle_steps if cools else train.cool_steps,
    }
    return derive(control, SAME_RATES, computed)


# -- planning and preflight


def compressed_schedule(config: RunConfig) -> RunConfig:
    """The config of a short run for measurements, with a few widths between those of the start and the target."""
    steps = STEPS_A_WIDTH * (NUM_EVENTS + 1)
    computed = {
        "train.steps": steps,
        "train.log_every_steps": steps + 1,
        "pruning.schedule": "none" if config.pruning.schedule == "none" else "linear",
        "pruning.interval_steps": STEPS_A_WIDTH,
        "pruning.end_fraction": NUM_EVENTS / (NUM_EVENTS + 1),
    }
    return derive(config, MEASUREMENT, computed)


def measurement_inputs(config: RunConfig) -> RunConfig:
    """The config for the inputs of a `compressed_schedule`.

    As in a run with teacher correction, the teacher needs no MLM head: a measurement does not depend on its quality.
    """
    return derive(config, MEASUREMENT_INPUTS)


def small_config(config: RunConfig, num_ranks: int) -> RunConfig:
    """The config of a trial step with one micro-batch per rank, which needs as much memory as a real step."""
    num_sequences = config.train.micro_batch_size * num_ranks
    names = ("train.global_batch_size", "pruning.compensation_sequences")
    return derive(config, TRIAL, dict.fromkeys(names, num_sequences))


# -- compensated events


class CalibrationConfig(NamedTuple):
    config: RunConfig
    num_sequences: int
    """Sequences over all ranks."""


def calibration_config(config: RunConfig, num_ranks: int) -> CalibrationConfig:
    """The config for the statistics of an event: steps of `pruning.compensation_sequences`, rounded up to a multiple of
    micro-batch size x ranks."""
    share = -(-config.pruning.compensation_sequences // num_ranks)
    micro_batch = min(share, config.train.micro_batch_size)
    num_sequences = -(-share // micro_batch) * micro_batch * num_ranks
    computed = {"train.global_batch_size": num_sequences, "train.micro_batch_size": micro_batch}
    return CalibrationConfig(derive(config, CALIBRATION, computed), num_sequences)


# -- several students in one job


def student_config(config: RunConfig, student: RunConfig, name: str) -> RunConfig:
    """The config of a student of the job `config`: its folder, and whole teacher passes, which students share."""
    folder = str(Path(config.run_dir) / STUDENTS_FOLDER / name)
    return derive(student, STUDENT, {"run.name": name, "run.dir": folder})


def shared_job_config(config: RunConfig) -> RunConfig:
    """The config of a job with several students."""
    return derive(config, SHARED_JOB)


def job_folder_config(config: RunConfig) -> RunConfig:
    """The config for the folder of such a job. It has no checkpoints to resume from; those are in the students'."""
    return derive(config, JOB_FOLDER)
