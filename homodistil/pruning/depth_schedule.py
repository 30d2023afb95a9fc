"""When layers leave a student that starts with all of its teacher's, and which of them may.

one_shot: all before step 1. linear: one at a time, evenly over the steps in which widths fall: of n layers, the j-th
leaves after update start + (end - start) x j / n, so that the last one leaves where pruning ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from homodistil.config.schema import PruningConfig


@dataclass(frozen=True)
class DepthSchedule:
    """Known before training; a checkpoint has to keep the layers that are left, and nothing of this."""

    table: dict[int, int]
    """Update after which layers leave (0: before the first) -> how many are left then. Empty: none leaves."""
    final: frozenset[int] | None
    """The layers that stay, as the student starts with them; None: those of most influence."""

    def due(self, step: int, num_layers: int) -> int | None:
        """How many layers are to be left after update `step`, of `num_layers` now; None: all stay for now.

        An event that fell on skipped updates is still due.
        """
        left = min((count for at, count in self.table.items() if at <= step), default=num_layers)
        return left if left < num_layers else None

    def candidates(self, layers: Sequence[int]) -> list[int]:
        """Which of the student's `layers` (as it started with them) may leave, by their current numbers.

        The first one always stays: what enters it are embeddings, which no other layer has learned to read.
        """
        return [i for i, layer in enumerate(layers) if i and (self.final is None or layer not in self.final)]

    def layers_left(self, saved: Sequence[int]) -> Sequence[int]:
        """The layers that a checkpoint has, as numbers of those that the student starts with.

        Args:
            saved: as the checkpoint says. One of before may be of a plain copy, and count the copy's own layers: they
                are those that the only event, before step 1, leaves.
        """
        was_copy = self.final is not None and self.table == {0: len(self.final)} and len(saved) == len(self.final)
        return sorted(self.final) if was_copy else saved

    def describe(self) -> str:
        """When layers leave, for the summary before a run."""
        if list(self.table) == [0]:
            return "before step 1"
        count = len(self.table)
        return f"in {count} event{'s' if count > 1 else ''} of steps {min(self.table)} to {max(self.table)}"


def depth_schedule(
    pruning: PruningConfig, num_steps: int, num_layers: int, final: Sequence[int], chosen: bool
) -> DepthSchedule:
    """The schedule of a run of `num_steps` optimizer steps.

    Args:
        num_layers: layers that the student starts with.
        final: the layers that stay, where they are known (`copied_layers`); as many stay anyway.
        chosen: whether influence decides instead which ones stay.
    """
    leaving = num_layers - len(final)
    staying = None if chosen else frozenset(final)
    if pruning.depth_schedule == "one_shot" or not leaving:
        return DepthSchedule({0: len(final)} if leaving else {}, staying)
    start, end = (round(fraction * num_steps) for fraction in (pruning.start_fraction, pruning.end_fraction))
    # A later layer of the same step comes later in the table: of several that leave at once all do.
    steps = ((start * leaving + (end - start) * j + leaving // 2) // leaving for j in range(1, leaving + 1))
    return DepthSchedule({max(1, step): num_layers - j for j, step in enumerate(steps, start=1)}, staying)
