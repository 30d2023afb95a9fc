"""What `auto` stands for in pruning.schedule and pruning.compensation, and what a cut at once is fitted to."""

from __future__ import annotations

import dataclasses

from homodistil.config.schema import PruningConfig, RunConfig
from homodistil.data.task import task_of

OF_GRADUAL_SCHEDULES = ("start_fraction", "end_fraction", "interval_steps", "max_event_fraction")
"""Fields of pruning that mean nothing to a cut at once: who sets one wants a gradual one."""

SEQUENCES_AT_ONCE = 512
"""pruning.compensation_sequences of a cut at once, unless the user has set it: it is paid for once (LOG.md)."""


def schedule_of(config: RunConfig) -> str:
    """`pruning.schedule` as a run has it. A compensation that is still `auto` counts as one."""
    if config.pruning.schedule != "auto":
        return config.pruning.schedule
    if config.student.init == "random":
        return "none"
    is_gradual = "one_shot" in config.run.compare or bool(config.run.export_milestones)
    is_gradual |= not config.given.isdisjoint(f"pruning.{name}" for name in OF_GRADUAL_SCHEDULES)
    return "cubic" if is_gradual or config.pruning.compensation == "none" else "one_shot"


def compensation_of(config: RunConfig) -> str:
    """What `pruning.compensation=auto` stands for, of a family whose cuts can be compensated; the task is settled.

    An embedder that only loses layers keeps the others as they are: refitted it begins nearer to its teacher, and
    ends further away (LOG.md, 2026-12-01).
    """
    task = task_of(config.data)
    if task.has_vectors and only_layers_leave(config):
        return "none"
    weighs = task.head != "none" or task.has_vectors  # what the basis is chosen by: a head, or vectors
    return "full" if weighs else "refit"


def only_layers_leave(config: RunConfig) -> bool:
    """Whether a shallower student keeps the teacher's widths."""
    student = config.student
    ways = (student.size, student.parameters, student.hidden_size, student.intermediate_size, student.head_dim)
    ways += (student.num_attention_heads, student.num_key_value_heads)
    keeps_widths = config.pruning.schedule == "none" or (student.preset == "teacher" and ways == (None,) * len(ways))
    return student.num_hidden_layers is not None and keeps_widths


def with_schedule(config: RunConfig) -> PruningConfig:
    """The section `pruning`, with the schedule that a run has."""
    return dataclasses.replace(config.pruning, schedule=schedule_of(config))


def give_sequences(config: RunConfig) -> None:
    """The number of sequences that suits a schedule that is settled, in place, unless the user has chosen."""
    if config.pruning.schedule == "one_shot" and "pruning.compensation_sequences" not in config.given:
        config.pruning.compensation_sequences = SEQUENCES_AT_ONCE


def give_ridge(config: RunConfig) -> None:
    """Let the ridge of each linear of a decoder be chosen, in place, where the user has set none.

    Its last linears read thousands of neurons, for which the ridge of encoders is too small (LOG.md).
    """
    if "pruning.compensation_ridge" not in config.given:
        config.pruning.compensation_ridge = None
