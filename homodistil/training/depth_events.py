"""Events in which layers leave the student: which ones, by their block influence on the run's text, and their line.

pruning/depth_schedule.py says when and how many; training/shrinking.py carries the events out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distributed import ranks
from homodistil.pruning.block_influence import block_influence, most_influential
from homodistil.pruning.depth_schedule import DepthSchedule


class LayerChoice(NamedTuple):
    kept: list[int]
    """Layers that stay, by their numbers before the event, ascending."""
    influence: list[float]
    """1 - cosine of input and output of every layer before the event, mean over tokens."""


def choose_layers(student: Student, batches: Iterator[Batch], schedule: DepthSchedule, count: int) -> LayerChoice:
    """Which `count` layers of a plain student stay. Every rank calls it, and all get the same.

    Args:
        batches: of this rank.
    """
    was_training = student.training
    influence = block_influence(student.eval().show, student.num_layers, batches)
    student.train(was_training)
    kept = most_influential(influence, count, schedule.candidates(student.layers))
    return LayerChoice(ranks.on_rank_zero(lambda: kept), influence)


def depth_event(
    step: int,
    choice: LayerChoice,
    layers: tuple[int, ...],
    widths: tuple[dict[str, int], dict[str, int]],
    gap: tuple[dict[str, float], dict[str, float]],
) -> dict:
    """A line of events.jsonl, in the form of a resize event's.

    Args:
        layers: of the student before, by their numbers in the teacher.
        widths, gap: before and after.
    """
    return {
        "step": step,
        "layers_before": list(layers),
        "layers_after": [layers[i] for i in choice.kept],
        "influence": {str(layer): value for layer, value in zip(layers, choice.influence, strict=True)},
        "widths_before": widths[0],
        "widths_after": widths[1],
        "changed": ["layers"],
        "gap_before": gap[0],
        "gap_after": gap[1],
    }


def describe(event: dict) -> str:
    """The event in one line, for the console."""
    left = [layer for layer in event["layers_before"] if layer not in event["layers_after"]]
    gone = ", ".join(f"{layer} (influence {event['influence'][str(layer)]:.3f})" for layer in left)
    stay = ", ".join(map(str, event["layers_after"]))
    when = f"after step {event['step']}" if event["step"] else "before step 1"
    return f"layers of the teacher that leave {when}: {gone}; {len(event['layers_after'])} stay: {stay}"
