"""What a run is compared with: the same materials, losses and steps, cut at once before step 0.

For each milestone of a family the same at its widths, for as many steps as the milestone had taken, in two variants,
because neither alone is fair. With a learning rate of its own, which falls to 0 within those steps: what one would have
got by aiming at that size alone, while the milestone was taken from the middle of a longer run, where the rate is still
high. And with the run's own rates step by step: what pruning gradually makes of the very same training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from homodistil.config import RunConfig
from homodistil.pruning.milestones import milestone_name

PLAIN = "plain_one_shot"


class Control(NamedTuple):
    name: str
    """Of its folder in `compare`."""
    label: str
    """In tables."""
    config: RunConfig
    facts: dict[str, Any]
    """For its row: milestone, step and rates ("own" or "run"), where it belongs to a milestone."""


def controls(config: RunConfig, family: list[Mapping[str, Any]]) -> Iterator[Control]:
    """All controls of a run. `family`: the records of its milestones (family.json)."""
    for name in config.run.compare:
        ends = [record for record in family if record["step"] == config.train.steps]
        facts = _facts(ends[0], "own") if ends else {}
        yield Control(name, name, control_config(config, name), facts)
        for record in family:
            if record["step"] < config.train.steps:
                yield from _at_milestone(config, name, record)


def _at_milestone(config: RunConfig, name: str, record: Mapping[str, Any]) -> Iterator[Control]:
    fraction = milestone_name(record["milestone"])
    for rates, suffix in (("own", ""), ("run", ", the run's rates")):
        folder = f"{name}-{fraction}" + ("-same-rates" if rates == "run" else "")
        control = milestone_control_config(config, name, record, rates == "run")
        control.run.name = folder
        yield Control(folder, f"{name} @ {fraction}{suffix}", control, _facts(record, rates))


def _facts(record: Mapping[str, Any], rates: str) -> dict[str, Any]:
    return {"milestone": record["milestone"], "step": record["step"], "rates": rates}


def control_config(config: RunConfig, name: str) -> RunConfig:
    """The same run cut at once, before step 0; `plain_one_shot`: by a mere selection of neurons as well."""
    control = copy.deepcopy(config)
    control.run.name, control.run.export_milestones, control.run.settle_steps = name, [], 0
    control.pruning.schedule = "one_shot"
    if name == PLAIN:
        control.pruning.compensation, control.pruning.one_shot_stages = "none", 1
    return control


def milestone_control_config(
    config: RunConfig, name: str, record: Mapping[str, Any], same_rates: bool = False
) -> RunConfig:
    """`control_config` at a milestone's widths, for its steps.

    Args:
        same_rates: the learning rates of the run's first steps, instead of a schedule over these steps alone.
    """
    control, train = control_config(config, name), config.train
    control.train.steps = record["step"]
    control.train.lr_steps = (train.lr_steps or train.steps) if same_rates else 0
    student = control.student
    student.preset, student.hidden_size = "custom", record["hidden_size"]
    student.intermediate_size = record["intermediate_size"]
    student.num_attention_heads = record["num_attention_heads"]
    return control
