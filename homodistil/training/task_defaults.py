"""What a task gives a run that leaves it open, and whether a run that leaves its task open wants words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from homodistil.config.schema import LM_HEAD_WEIGHTS, TASK_DEFAULTS, RunConfig, set_value, value_of


def wants_head(config: RunConfig) -> bool:
    """Whether the config, which leaves the task to the teacher, makes or uses a language-modelling head."""
    given = any(name in config.given and value_of(config, name) > 0 for name in LM_HEAD_WEIGHTS)
    return given or config.teacher.correction_steps > 0


def give_defaults(config: RunConfig, names: Sequence[str], leave_out: Collection[str] = ()) -> None:
    """Give a run what suits its task, where the user has set nothing else.

    Args:
        names: the weights that the task alone has; where one of them is set, none is given.
        leave_out: those of the task's defaults that do not suit the teacher or the data.
    """
    weights = [f"loss.{name}" for name in names]
    has_weight = any(name in config.given or value_of(config, name) > 0 for name in weights)
    for name, value in TASK_DEFAULTS[config.data.task].items():
        if name not in (*config.given, *leave_out) and not (has_weight and name in weights):
            set_value(config, name, value)
