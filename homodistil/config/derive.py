"""Run configs that are made from another one: the teacher's correction, controls, a measurement, one step on trial.

A field says in the schema which value it has in such a run (`option.py`), so that whoever adds one decides it there.
What follows from other fields or from results is computed here. No function changes its arguments.
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

# The teacher must not have seen the student's batches with the student's masks (research: seed reuse costs .05).
SEED_OFFSET = 7919
NUM_EVENTS = 3
"""Resize events of a measurement."""
STEPS_A_WIDTH = 6
"""Steps of a measurement between two of them."""
STUDENTS_FOLDER = "students"
"""In the folder of a job: the folders of its students."""


def derive(config: RunConfig, run: str, computed: Mapping[str, Any] | None = None) -> RunConfig:
    """A copy of `config` with the values that fields declare for a derived run.

    Args:
        run: one of `option.DERIVED_RUNS`.
        computed: dotted name -> value of the fields that declare COMPUTED: all of these, and no other.
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
    """The run config of the correction: same data and batches, MLM alone, its own steps, rate and seed."""
    teacher = config.teacher
    computed = {"steps": teacher.correction_steps, "lr": teacher.correction_lr}
    computed |= {"seed": teacher.correction_seed + SEED_OFFSET}
    return derive(config, CORRECTION, {f"train.{name}": value for name, value in computed.items()})


def correction_key(config: RunConfig) -> dict[str, Any]:
    """Values that the corrected teacher depends on: field -> value; those of the optimizer are a mapping of their own.

    Caches on disk are found by it: another form of it would orphan them.
    """
    correction, key = correction_config(config), {"optimizer": {}}
    for name, facts in OPTIONS.items():
        if facts.derived.get(CORRECTION) in (KEY, COMPUTED_KEY):
            section, _, field = name.partition(".")
            (key["optimizer"] if section == "optimizer" else key)[field] = value_of(correction, name)
    return key


# -- controls


def control_config(config: RunConfig, name: str) -> RunConfig:
    """The config of a run that is cut at once, before step 0; `plain_one_shot`: by a mere selection of neurons as
    well."""
    control = derive(config, CONTROL, {"run.name": name})
    return derive(control, PLAIN_CONTROL) if name == "plain_one_shot" else control


def milestone_control_config(config: RunConfig, name: str, folder: str, record: Mapping[str, Any]) -> RunConfig:
    """`control_config` at a milestone's widths, for its steps, over which the learning rate falls to 0.

    Args:
        folder: name of its folder.
        record: of the milestone (training/milestone_exports.py).
    """
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    computed = {"run.name": folder, "train.steps": record["step"]} | {f"student.{size}": record[size] for size in sizes}
    return derive(control_config(config, name), MILESTONE, computed)


def with_rates_of(control: RunConfig, config: RunConfig, so_far: Sequence[Mapping[str, Any]]) -> RunConfig:
    """A milestone's control with the learning rates of the first steps of `config`, cool-downs included.

    Args:
        so_far: records of the milestones until this one.
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
    """The config of a short run for measurements: its widths lie on the way to the same target."""
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
    """For the inputs of a `compressed_schedule`, whose teacher need not know anything: one without an MLM head will do,
    as it does for a run that corrects it."""
    return derive(config, MEASUREMENT_INPUTS)


def small_config(config: RunConfig, num_ranks: int) -> RunConfig:
    """The run with one micro-batch per rank and step: what a step holds in memory stays the same."""
    num_sequences = config.train.micro_batch_size * num_ranks
    names = ("train.global_batch_size", "pruning.compensation_sequences")
    return derive(config, TRIAL, dict.fromkeys(names, num_sequences))


# -- compensated events


class CalibrationConfig(NamedTuple):
    config: RunConfig
    num_sequences: int


def calibration_config(config: RunConfig, num_ranks: int) -> CalibrationConfig:
    """The run's config with steps of `pruning.compensation_sequences`, rounded up so that ranks share them evenly."""
    share = -(-config.pruning.compensation_sequences // num_ranks)
    micro_batch = min(share, config.train.micro_batch_size)
    num_sequences = -(-share // micro_batch) * micro_batch * num_ranks
    computed = {"train.global_batch_size": num_sequences, "train.micro_batch_size": micro_batch}
    return CalibrationConfig(derive(config, CALIBRATION, computed), num_sequences)


# -- several students in one job


def student_config(config: RunConfig, student: RunConfig, name: str) -> RunConfig:
    """A student of the job `config`, in its folder there; the teacher's passes are whole, since several share them."""
    folder = str(Path(config.run_dir) / STUDENTS_FOLDER / name)
    return derive(student, STUDENT, {"run.name": name, "run.dir": folder})


def shared_job_config(config: RunConfig) -> RunConfig:
    """The job of several students."""
    return derive(config, SHARED_JOB)


def job_folder_config(config: RunConfig) -> RunConfig:
    """For the folder of such a job, which has no checkpoints to resume from: the folders of its students have them."""
    return derive(config, JOB_FOLDER)
