"""Arms of the study `refit`: every form of the cut, made at once and in events, with the same losses and steps.

A value that the product does not have yet is an arm to come: the study names it with the product's refusal.
"""

from __future__ import annotations

from experiments.quality.arms import EARLY, FULL, ONE_SHOT, OUR_WEIGHTS, Arm

LEARNED = ("pruning.basis=learned",)
PROJECT = ("pruning.compensation=project",)
END_SHARE = 0.1
"""Of the steps: the end of pruning, as in EARLY."""
EVENTS_APART = 1 / 48
"""Of the steps: five at 240, as in EARLY. Longer runs have as many events as short ones, and so differ in one thing."""
DECODER_RATE = 3e-4
"""Usual learning rate of all arms where the teacher is a decoder."""

_FORMS = {
    "full": ("full", FULL, 3e-3),
    "none": ("selection", ("pruning.compensation=none",), 6e-3),
    "refit": ("refit", ("pruning.compensation=refit",), 3e-3),
    "project": ("project", PROJECT, 3e-3),
    "full_learned": ("full, learned basis", (*FULL, *LEARNED), 3e-3),
    "project_learned": ("project, learned basis", (*PROJECT, *LEARNED), 3e-3),
}
"""Name -> (how the table calls it, overrides, usual learning rate at half width)."""
_PACES = {"one_shot": ("one-shot", ONE_SHOT), "gradual": ("gradual", EARLY)}

REFIT_ARMS = {
    f"{form}_{pace}": Arm(
        f"{form}_{pace}", f"{label}, {when}", (*fields, *schedule, *OUR_WEIGHTS), is_ours=True, rate=rate
    )
    for pace, (when, schedule) in _PACES.items()
    for form, (label, fields, rate) in _FORMS.items()
}
REFERENCE = "full_one_shot"
"""The arm that all differences are taken to."""


def is_gradual(arm: Arm) -> bool:
    return ONE_SHOT[0] not in arm.overrides


def pace(arm: Arm, steps: int, length: int = 1) -> tuple[str, ...]:
    """The distance of a gradual arm's events in a run of `length` times so many steps."""
    return (f"pruning.interval_steps={length * _interval(steps)}",) if is_gradual(arm) else ()


def _interval(steps: int) -> int:
    return max(1, round(EVENTS_APART * steps))


def cut_alone(arm: Arm, steps: int) -> tuple[int, tuple[str, ...]]:
    """Number of steps and overrides of a run that makes the arm's cut and, at UNTRAINED_RATE, trains nothing.

    Args:
        steps: of the run whose cut it is. A gradual one has the same events at the same steps.
    """
    if not is_gradual(arm):
        return 1, ()
    end = max(1, round(END_SHARE * steps))
    total = end + _interval(steps)  # the last event is at a multiple of the interval, so it may come after `end`
    return total, (*pace(arm, steps), f"pruning.end_fraction={end / total:.6g}")
