"""Where the time of a training step goes, measured from outside: the product's functions are wrapped while it runs.

    with measured(trainer, clock):
        with clock.step():
            trainer.train_step()
    clock.take()  # {"teacher": 0.41, ..., "other": 0.003}, seconds

Time is EXCLUSIVE: a part inside another (a teacher layer that runs in lock-step inside the student's forward) is
counted once, for the inner one. On a GPU the device is synchronised where parts begin and end, so steps that are
measured this way are slower than others: take tokens/s from steps without.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from workload import synchronize

OTHER = "other"


class Point(NamedTuple):
    """A function whose time belongs to `part`: attributes after `owner`, "trainer" or a module of homodistil."""

    part: str
    owner: str
    attribute: str


POINTS = (
    Point("data wait", "trainer", "feed.micro_batches"),
    # The teacher as a whole, or (lock-step) piece by piece inside the student's forward.
    Point("teacher", "trainer", "teacher.forward"),
    Point("teacher", "homodistil.distill.teacher_outputs", "Finished._seen"),
    Point("teacher", "homodistil.distill.teacher_outputs", "Layerwise.run_embedding"),
    Point("teacher", "homodistil.distill.teacher_outputs", "Layerwise.run_layer"),
    Point("teacher", "homodistil.distill.teacher_outputs", "Targets.logits"),
    Point("teacher", "homodistil.distill.teacher_outputs", "Targets.before_decoder"),
    Point("student forward", "trainer", "engine.forward"),
    Point("losses", "homodistil.distill.objective", "Comparison.embedding"),
    Point("losses", "homodistil.distill.objective", "Comparison.layer"),
    Point("losses", "homodistil.distill.losses.vocabulary", "masked_lm_losses"),
    Point("losses", "homodistil.distill.losses.vocabulary", "linear_masked_lm_losses"),
    Point("backward", "homodistil.training.trainer", "backward"),
    Point("importance", "trainer", "measure_importance"),
    Point("importance", "trainer", "pruner.accept"),
    Point("optimizer", "trainer", "engine.step"),
    Point("logging", "trainer", "monitor.see"),
    Point("logging", "trainer", "monitor.end_step"),
    Point("resize", "trainer", "resize_due"),
    Point("resize", "trainer", "resize"),
    Point("gap", "trainer", "gap.measure"),
)
"""What a step consists of. What does not exist under a setting is left out."""

PARTS = tuple(dict.fromkeys(point.part for point in POINTS))
"""In the order of a step. "gap": the probe of the gap to the teacher before and after a resize event."""
EVENT_PARTS = ("resize", "gap")


class PartClock:
    """Seconds of every part, exclusive of the parts inside it. Only the thread that made it is measured."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self._thread = threading.get_ident()
        self._seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around a whole step: what is in none of its parts counts as "other"."""
        return self.part(OTHER)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self._counts(name):
            yield
            return
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _counts(self, name: str) -> bool:
        # The backward of a GPU, and what prefetches, run in threads of their own, beside the step.
        if threading.get_ident() != self._thread:
            return False
        if not self._stack:
            return name == OTHER  # outside of a step nothing is counted
        return self._stack[-1] not in EVENT_PARTS or name in EVENT_PARTS  # an event's forward passes are its own

    def _turn(self) -> None:
        """The time since the last turn belongs to the innermost part."""
        synchronize(self._device)
        now = self._now()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds of every part since the last call, "other" too."""
        found = {name: self._seconds[name] for name in (*PARTS, OTHER)}
        self._seconds.clear()
        return found


@contextlib.contextmanager
def measured(trainer, clock: PartClock) -> Iterator[None]:
    """Wrap every point of `POINTS`; everything is as before afterwards.

    Raises:
        LookupError: none of the points of a part exists, so `POINTS` no longer describes the product.
    """
    with contextlib.ExitStack() as undo:
        found = {point.part for point in POINTS if _wrap(point, trainer, clock, undo)}
        if missing := [part for part in PARTS if part not in found]:
            raise LookupError(f"step_parts.POINTS: nothing to wrap for {', '.join(missing)}")
        yield


def _wrap(point: Point, trainer, clock: PartClock, undo: contextlib.ExitStack) -> bool:
    """Whether the point exists; `undo` restores it."""
    *path, name = point.attribute.split(".")
    try:
        owner = trainer if point.owner == "trainer" else importlib.import_module(point.owner)
        for step in path:
            owner = getattr(owner, step)
        inner = getattr(owner, name)
    except (ImportError, AttributeError):
        return False
    own = vars(owner).get(name)
    undo.callback(_restore, owner, name, own)
    setattr(owner, name, _timed(inner, point.part, clock))
    return True


def _restore(owner, name: str, own) -> None:
    if own is None:
        delattr(owner, name)  # the class's method shows again
    else:
        setattr(owner, name, own)


def _timed(function: Callable, part: str, clock: PartClock) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with clock.part(part):
            found = function(*args, **kwargs)
        # What is put off (importance is taken in once the step has been applied) belongs to the same part.
        return _timed(found, part, clock) if isinstance(found, types.FunctionType) else found

    return wrapper


def explained(seconds: dict[str, float]) -> float:
    """Share of the step that the named parts account for."""
    total = sum(seconds.values())
    return 1 - seconds[OTHER] / total if total else 1.0


def summed(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) for name in (*PARTS, OTHER)}
