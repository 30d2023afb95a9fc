"""The study `gap`: how far the student is from its teacher all along, for several ends of pruning.

One learning rate for all (the first of --rates): what is looked at is the path, not who is best. The distances are the
run's own: its probe (48 held-out sequences) every few steps, and before and after every resize event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experiments.quality.arms import BASE, ONE_SHOT, SHAPES
from experiments.quality.jobs import Train
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.specs import RunSpec
from homodistil.metrics.recorder import EVENTS_FILE, METRICS_FILE, read_lines

ENDS: dict[str, tuple[str, ...]] = {
    "one-shot": ONE_SHOT,
    **{f"t_f = {end:g}": (f"pruning.end_fraction={end:g}",) for end in (0.3, 0.5, 0.7, 0.9)},
}
"""Where pruning ends, as a share of all steps."""
QUICK_ENDS = ("one-shot", "t_f = 0.9")
NUM_LOOKS = 60
"""Evaluations over a run."""

Curve = list[tuple[int, float]]


@dataclass
class Course:
    """One end of pruning at one width."""

    end: str
    width: str
    runs: dict[int, dict] = field(default_factory=dict)
    """Seed -> measured."""
    curves: dict[int, dict[str, Curve]] = field(default_factory=dict)
    """Seed -> term of the gap -> (step, value); at an event two points, before and after."""
    events: dict[int, list[dict]] = field(default_factory=dict)
    """Seed -> lines of events.jsonl."""


def run(pool: Pool, options: Options) -> list[Course]:
    ends = QUICK_ENDS if options.quick else tuple(ENDS)
    paths = [Course(end, width) for width in options.widths for end in ends]
    cells = [(path, seed, _job(options, path, seed)) for seed in options.seeds for path in paths]
    for (path, seed, job), result in zip(cells, pool.run("gap", [cell[2] for cell in cells]), strict=True):
        if result:
            folder = job.folder(pool.work)
            path.runs[seed] = result
            path.events[seed] = read_lines(folder / EVENTS_FILE)
            path.curves[seed] = curves(folder)
    return paths


def _job(options: Options, path: Course, seed: int) -> Train:
    every = max(1, options.steps // NUM_LOOKS)
    parts = (BASE, SHAPES[path.width].overrides, ENDS[path.end], options.set, (f"train.eval_every_steps={every}",))
    spec = RunSpec.of(f"{path.end}/{path.width}", *parts, steps=options.steps, lr=options.rates[0], seed=seed)
    return Train(spec, eval_blocks=options.eval_blocks)


def curves(folder: Path) -> dict[str, Curve]:
    """Every term of the gap over the steps of a run, from its evaluations and its events, in order of time."""
    points_of: dict[str, list[tuple[int, int, float]]] = {}
    for line in read_lines(folder / METRICS_FILE):
        if line["kind"] == "evaluation":
            # Step 0 is measured before an event of step 0, later ones after what their step brought.
            place = 0 if line["step"] == 0 else 3
            _add(points_of, line["step"], place, {n[4:]: v for n, v in line.items() if n.startswith("gap/")})
    for event in read_lines(folder / EVENTS_FILE):
        _add(points_of, event["step"], 1, event["gap_before"])
        _add(points_of, event["step"], 2, event["gap_after"])
    return {term: [(step, value) for step, _, value in sorted(points)] for term, points in points_of.items()}


def _add(points_of: dict, step: int, place: int, values: dict[str, float]) -> None:
    for term, value in values.items():
        points_of.setdefault(term, []).append((step, place, value))


def jumps(events: list[dict], term: str = "kl") -> list[float]:
    """What each event added to a term of the gap."""
    return [event["gap_after"][term] - event["gap_before"][term] for event in events]


def mean_over_steps(curve: Curve) -> float:
    """Area under the curve by trapezoids, over the number of steps."""
    pairs = zip(curve, curve[1:], strict=False)
    area = sum((after - before) * (low + high) / 2 for (before, low), (after, high) in pairs)
    return area / (curve[-1][0] - curve[0][0])
