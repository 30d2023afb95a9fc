"""What a run is compared with: the same materials, losses and steps, cut at once before step 0.

For each milestone of a family the same at its widths, for as many steps as the milestone had taken, in two variants,
because neither alone is fair. With a learning rate of its own, which falls to 0 within those steps: what one would have
got by aiming at that size alone, while the milestone was taken from the middle of a longer run, whose rate is made for
all its steps. And with the run's own rates step by step, cool-downs included: what pruning gradually makes of the very
same training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from homodistil.config.derive import control_config, milestone_control_config, with_rates_of
from homodistil.config.schema import RunConfig
from homodistil.pruning.milestones import milestone_name


class Control(NamedTuple):
    name: str
    """Name of its folder in `compare`."""
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
        control = milestone_control_config(config, name, folder, record)
        if rates == "run":
            control = with_rates_of(control, config, so_far)
        yield Control(folder, f"{name} @ {fraction}{suffix}", control, _facts(record, rates))


def _facts(record: Mapping[str, Any], rates: str) -> dict[str, Any]:
    return {"milestone": record["milestone"], "step": record["step"], "rates": rates}
