"""What a tracker is: it takes the values that a recorder logs, under the tags of TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Tracker(Protocol):
    """Takes the values of one run. The recorder of rank 0 calls it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take values after `step` optimizer steps, by tag. Steps behind a checkpoint come again when a run resumes."""

    def finish(self, result: Mapping[str, float] | None) -> None:
        """End it.

        Args:
            result: the numbers of the run's row in the result table, by tag; None: the run has stopped before its end.
        """


class TrackedRun(NamedTuple):
    """What a tracker says of a run besides its values."""

    folder: Path
    """The run folder."""
    name: str
    config: Mapping[str, Mapping[str, Any]]
    """Section -> field -> value of the run config."""
