"""The measurements: same loss, time of a step, peak memory, a whole schedule. Peers take turns, A B A B."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from benchmarks.harness.memory_counters import STRICT_ALLOCATOR
from benchmarks.peers.processes import PeerError, Running, Variant
from benchmarks.peers.workload import TERMS, Files, Task

TOLERANCE = {"fp32": 2e-4, "bf16": 0.03}
"""Relative difference between peers in a term: fp32 sums in another order; bf16 has 8 bits, and TextBrewer also adds
up its losses in them."""
WARMUP_STEPS = 2
MEMORY_STEPS = 2


@dataclass(frozen=True)
class Place:
    """Where peers run."""

    task: Task
    files: Files
    threads: int
    clock: str = "wall"
    """wall, or processor: seconds of computing, for a machine that others use."""


@contextlib.contextmanager
def running(variants: Iterable[Variant], place: Place, environment: dict | None = None) -> Iterator[list[Running]]:
    """All of them started; ended on leaving."""
    started: list[Running] = []
    try:
        for variant in variants:
            started.append(Running(variant, place.task, place.files, place.threads, environment))
        yield [one.wait_until_ready() for one in started]
    finally:
        for one in started:
            one.close()


def step_ms(one: Running, place: Place) -> float:
    return one.ask("step", clock=place.clock)["ms"]


def same_loss(peers: list[Running], place: Place) -> dict[str, dict[str, float]]:
    """Label -> terms of the first batch at the starting weights.

    Raises:
        PeerError: a peer's term is not the first one's.
    """
    terms_of, tolerance = {}, TOLERANCE[place.task.precision]
    for one in peers:
        if one.variant.module != "ours":  # it has done its first step
            step_ms(one, place)
        terms = one.ask("terms")
        terms_of[one.variant.label] = {name: terms[name] for name in TERMS}
    first, wanted = next(iter(terms_of.items()))
    for label, terms in terms_of.items():
        for name in TERMS:
            if not abs(terms[name] - wanted[name]) <= tolerance * abs(wanted[name]):
                raise PeerError(f"{label}: {name} is {terms[name]:.6g}, that of {first} {wanted[name]:.6g}")
    return terms_of


def steps(peers: list[Running], place: Place, rounds: int) -> dict[str, list[float]]:
    """Label -> milliseconds of its step in every round."""
    for _ in range(WARMUP_STEPS):
        for one in peers:
            step_ms(one, place)
    times_ms: dict[str, list[float]] = {one.variant.label: [] for one in peers}
    for _ in range(rounds):
        for one in peers:
            times_ms[one.variant.label].append(step_ms(one, place))
    return times_ms


def memory(variants: list[Variant], place: Place) -> dict[str, dict[str, float]]:
    """Label -> bytes: peak resident set during steps, and what libraries took before anything was built.

    Fresh processes, one at a time, with an allocator that returns freed memory at once.
    """
    peaks = {}
    for variant in variants:
        with running([variant], place, STRICT_ALLOCATOR) as [one]:
            step_ms(one, place)  # makes the optimizer's state
            one.ask("start_peak")
            for _ in range(MEMORY_STEPS):
                step_ms(one, place)
            peaks[variant.label] = one.ask("peak")
    return peaks


@dataclass(frozen=True)
class Point:
    """One width of the schedule."""

    step: int
    hidden: int
    ours_ms: list[float]
    others_ms: dict[str, list[float]]
    event: dict[str, float] | None
    """Cost of the resize event that led here: ms, and move_ms without the probe of the gap."""


@dataclass(frozen=True)
class Curve:
    points: list[Point]
    events: list[tuple[int, int]]
    """(step, hidden width after it) of the recipe's whole schedule."""
    steps: int


def curve(ours: Variant, rivals: list[Variant], place: Place, num_widths: int, rounds: int) -> Curve:
    """Steps at widths along the recipe's schedule, `others` by turns with ours."""
    along = replace(ours, options={"widths": "full"})
    with running([along, *rivals], place) as [first, *rest]:
        events = [tuple(event) for event in first.ask("schedule")["events"]]
        points = []
        for step, hidden in [(0, place.task.hidden), *_spread(events, place.task, num_widths - 1)]:
            event = first.ask("narrow", step=step) if step else None
            timed = steps([first, *rest], place, rounds)
            mine = timed.pop(along.label)
            points.append(Point(step, hidden, mine, timed, event))
    return Curve(points, events, 28000)


def _spread(events: list[tuple[int, int]], task: Task, count: int) -> list[tuple[int, int]]:
    """`count` events whose widths lie evenly between the teacher's and the student's, the last one included."""
    distance = (task.hidden - task.student_hidden) / count
    wanted = [task.hidden - distance * (i + 1) for i in range(count - 1)]
    chosen = {min(events, key=lambda event: abs(event[1] - width)) for width in wanted}
    return sorted(chosen | {events[-1]})
