"""The five arms, as overrides of the run config, and what was predicted of them before anything was trained."""

from __future__ import annotations

from typing import NamedTuple

from experiments.quality.arms import FULL, ONE_SHOT, PINNED, RANDOM, Arm

BASE = (
    *PINNED,
    "teacher.correction_lr=6e-4",
    "teacher.correction_seed=0",
    "student.preset=custom",
    "data.seq_len=128",
    "data.heldout_fraction=0.05",
    "data.task=mlm",
    "pruning.max_event_fraction=1",
    "loss.kl=4",
    "loss.hidden=1",
    "loss.attention=1",
    "loss.embedding=1",
    "loss.attention_target=probabilities_kl",
    "loss.projection=student",
    "loss.projection_learned=true",
)
"""Scores before the softmax have a part that it ignores, most of them in a deep teacher: attention_target."""

ENDS = {"B": 0.1, "D": 0.7}
"""Where pruning ends in the gradual arms, as a share of the steps."""
EVENTS = 8
"""Of a gradual arm, at most."""


def gradual(end: float, steps: int) -> tuple[str, ...]:
    return (f"pruning.end_fraction={end:g}", f"pruning.interval_steps={max(1, round(end * steps / EVENTS))}")


def arms(steps: int) -> dict[str, Arm]:
    """Letter -> arm. `steps`: of a run, by which intervals between events go."""
    early, late = (gradual(end, steps) for end in ENDS.values())
    made = (
        Arm("A", "A: full, one-shot", (*FULL, *ONE_SHOT), is_ours=True),
        Arm("B", "B: full, gradual, t_f = .1", (*FULL, *early), is_ours=True),
        Arm("C", "C: selection, one-shot", ONE_SHOT),
        Arm("D", "D: selection, gradual, t_f = .7 (the paper's form)", late),
        Arm("E", "E: random init, same losses", RANDOM),
    )
    return {arm.name: arm for arm in made}


WIDTHS = {"quarter": 4, "half": 2}
"""Width -> by what the teacher's hidden size and neurons are divided; heads stay. The first one chooses the rates."""
SAME_RATE = {"B": "A"}
"""Arms that take another one's rate: they differ by the schedule of the cut alone."""
ONLY_FIRST = ("E",)
"""Arms that are far behind, and so are trained at the first width, with the first seed alone."""
TUNED = ("A", "C", "D")
"""Arms whose exports at the first width are fine-tuned."""
PEER, REACHED = "C", "A"
"""The peer that is trained longer until it reaches the loss of the other arm."""


class Prediction(NamedTuple):
    """A difference of held-out MLM loss between two arms, in nats."""

    arm: str
    base: str
    width: str
    low: float
    high: float


PREDICTIONS = (
    Prediction("A", "C", "quarter", -0.20, -0.10),
    Prediction("A", "C", "half", -0.10, -0.05),
    Prediction("A", "B", "quarter", -0.01, 0.01),
    Prediction("A", "B", "half", -0.01, 0.01),
    Prediction("D", "C", "quarter", -0.05, 0.05),
    Prediction("D", "C", "half", -0.05, 0.05),
)
"""Written down before the experiment, from runs of 160 steps on 3 and 6 layers. If A - C is above -0.02 at a quarter of
the width, the compensated cut is a better start and nothing more."""
