"""What a run is compared with: the same materials, losses and steps, cut at once before step 0.

For each milestone of a family the same at its widths, for as many steps as the milestone had taken, in two variants,
because neither alone is fair. With a learning rate of its own, which falls to 0 within those steps: what one would have
got by aiming at that size alone, while the milestone was taken from the middle of a longer run, whose rate is made for
all its steps. And with the run's own rates step by step, cool-downs included: what pruning gradually makes of the very
same training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from homodistil.config.schema import RunConfig
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
        on_the_way = [record for record in family if record["step"] < config.train.steps]
        for i, record in enumerate(on_the_way):
            yield from _at_milestone(config, name, record, on_the_way[: i + 1])


def _at_milestone(config: RunConfig, name: str, record: Mapping[str, Any], so_far: list) -> Iterator[Control]:
    """`so_far`: the milestones until this one."""
    fraction = milestone_name(record["milestone"])
    for rates, suffix in (("own", ""), ("run", ", the run's rates")):
        folder = f"{name}-{fraction}" + ("-same-rates" if rates == "run" else "")
        control = milestone_control_config(config, name, record)
        control.run.name = folder
        if rates == "run":
            _same_rates(control, config, so_far)
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


def milestone_control_config(config: RunConfig, name: str, record: Mapping[str, Any]) -> RunConfig:
    """`control_config` at a milestone's widths, for its steps, over which the learning rate falls to 0."""
    control = control_config(config, name)
    control.train.steps, control.train.lr_steps, control.train.cool_from = record["step"], 0, []
    student = control.student
    student.preset, student.hidden_size = "custom", record["hidden_size"]
    student.intermediate_size = record["intermediate_size"]
    student.num_attention_heads = record["num_attention_heads"]
    return control


def _same_rates(control: RunConfig, config: RunConfig, so_far: list[Mapping[str, Any]]) -> None:
    """The learning rates of the run's first steps instead, with the cool-downs of its milestones."""
    train = config.train
    control.train.lr_steps, control.train.cool_from = train.lr_steps or train.steps, list(train.cool_from)
    if config.run.settle_cooldown and config.run.settle_steps:
        control.train.cool_from += [record["step"] - config.run.settle_steps for record in so_far]
        control.train.cool_steps = config.run.settle_steps
