"""The trackers of run.trackers: their packages, and how they are opened. None is imported unless a run uses it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

from homodistil.errors import UserError
from homodistil.metrics.trackers.background import BackgroundTracker, one_line, warn_off
from homodistil.metrics.trackers.tracker import TrackedRun, Tracker


class _Entry(NamedTuple):
    module: str
    """What is imported."""
    package: str
    """What is installed."""
    place: str
    """module:class; the class takes a `TrackedRun`."""


_TRACKERS = {
    "wandb": _Entry("wandb", "wandb", "homodistil.metrics.trackers.wandb_tracker:WandbTracker"),
    "mlflow": _Entry("mlflow", "mlflow-skinny", "homodistil.metrics.trackers.mlflow_tracker:MlflowTracker"),
}
"""Name in run.trackers, which is also that of the extra in pyproject.toml -> the tracker."""


def require_installed(names: Iterable[str]) -> None:
    """Raise `UserError` for the first tracker whose package is not installed. Imports none of them."""
    for name in names:
        if importlib.util.find_spec(_TRACKERS[name].module) is None:
            raise UserError(
                f"run.trackers: found {name}, whose package is not installed; install it with "
                f"pip install {_TRACKERS[name].package} (in a checkout: pip install -e '.[{name}]'), or leave it out"
            )


def open_trackers(names: Iterable[str], run: TrackedRun) -> list[Tracker]:
    """Each tracker in a thread of its own; one that cannot be imported is left out with a warning."""
    trackers: list[Tracker] = []
    for name in dict.fromkeys(names):
        module, _, class_name = _TRACKERS[name].place.partition(":")
        try:
            # Imported by this thread: a data worker that is forked during an import would inherit its locks.
            begin = functools.partial(getattr(importlib.import_module(module), class_name), run)
        except Exception as error:  # a package of a version that does not go with the others
            warn_off(name, one_line(error))
        else:
            trackers.append(BackgroundTracker(name, begin))
    return trackers
