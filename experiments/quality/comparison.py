"""The study `main`: every method at its own best learning rate, at two target sizes, with three seeds.

Rates are chosen by the MLM loss on the VALIDATION half, on the first seed; what is reported is the TEST half.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from experiments.quality import fine_tuning, probing
from experiments.quality.arms import ARMS, BASE, SHAPES, Arm
from experiments.quality.jobs import EvaluateTeacher, Keep, Train
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.specs import RunSpec
from experiments.quality.statistics import best_rate, choice_loss, extension

OWN_SHAPE = "own"
EXTENDED_SHARE = 0.5
"""Of the methods, roughly: whose grid gets a further rate. For the estimate of the time alone."""


@dataclass
class Entry:
    """One method at one width."""

    arm: Arm
    width: str
    validation: dict[float, float | None] = field(default_factory=dict)
    """Learning rate -> validation loss of the first seed, in nats (None: failed)."""
    rate: float | None = None
    """The chosen one."""
    extended: list[float] = field(default_factory=list)
    """The rates that were tried beyond the grid, in turn."""
    runs: dict[int, dict] = field(default_factory=dict)
    """Seed -> what `MeasuredRun.measured` gives, at the chosen rate."""
    tasks: dict[str, list[float]] = field(default_factory=dict)
    """Fine-tuning task -> score a seed."""
    probes: dict[str, list[float]] = field(default_factory=dict)
    """Probe of frozen features (`ProbeScores`) -> score a seed."""
    start: tuple[str, ...] | None = None
    """Overrides before the arm's own, with the target size; None: those of this study."""

    @property
    def label(self) -> str:
        return f"{self.arm.name}/{self.width}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the run config, without steps, rate and seed."""
        if self.start is not None:
            return (*self.start, *self.arm.overrides)
        return (*BASE, *(() if self.arm.own_shape else SHAPES[self.width].overrides), *self.arm.overrides)


@dataclass
class Comparison:
    """All that the tables of the main comparison are made of."""

    entries: list[Entry]
    teacher: dict
    teacher_tasks: dict[str, list[float]] = field(default_factory=dict)
    teacher_probes: dict[str, list[float]] = field(default_factory=dict)


def run(pool: Pool, options: Options) -> Comparison:
    entries = [Entry(ARMS[name], width) for name in options.arms for width in _widths(ARMS[name], options)]
    try_rates(pool, options, entries)
    run_seeds(pool, options, entries)
    some_rate = options.rates[0]
    teacher = EvaluateTeacher(spec(options, entries[0], some_rate, options.seeds[0]), options.eval_blocks)
    comparison = Comparison(entries, pool.run("teacher", [teacher])[0] or {})
    if options.tune:
        _probe(pool, options, comparison, teacher)
        _fine_tune(pool, options, comparison, teacher)
    _forget_others(pool, options, entries)
    return comparison


def _widths(arm: Arm, options: Options) -> tuple[str, ...]:
    return (OWN_SHAPE,) if arm.own_shape else options.widths


def spec(options: Options, entry: Entry, rate: float, seed: int, length: int = 1) -> RunSpec:
    """`length`: times the study's steps."""
    steps = 1 if entry.arm.is_untrained else options.steps * length
    label = entry.label if length == 1 else f"{entry.label} x{length}"
    return RunSpec.of(label, entry.overrides, options.set, steps=steps, lr=rate, seed=seed)


def job(options: Options, entry: Entry, rate: float, seed: int, keep: Keep = Keep.NO, length: int = 1) -> Train:
    return Train(spec(options, entry, rate, seed, length), keep, options.eval_blocks)


def try_rates(pool: Pool, options: Options, entries: list[Entry], extensions: int = 1) -> None:
    """The grid on the first seed, then at most `extensions` further rates, as long as the best is at its end."""
    later_seeds = len(options.seeds) - 1
    later = {"Train": round(len(entries) * (later_seeds + EXTENDED_SHARE))} | _tuning(options, entries)
    cells = [(entry, rate) for entry in entries for rate in options.grid(entry.arm, entry.width)]
    cells.sort(key=lambda cell: cell[1])
    _validate(pool, options, "learning rates", cells, later)
    later = {"Train": len(entries) * later_seeds} | _tuning(options, entries)
    for _ in range(extensions):
        _validate(pool, options, "further rates", _extend(entries), later)
    for entry in entries:
        entry.rate = best_rate(entry.validation)


def _extend(entries: list[Entry]) -> list[tuple[Entry, float]]:
    """The methods whose best rate is at an end of what was tried, each with the further rate that it gets."""
    cells = []
    for entry in entries:
        rate = None if entry.arm.is_untrained else extension(entry.validation)
        if rate is not None:
            entry.extended.append(rate)
            cells.append((entry, rate))
    return cells


def _validate(pool: Pool, options: Options, phase: str, cells: list[tuple[Entry, float]], later: dict) -> None:
    keep = Keep.IF_NEW if options.tune else Keep.NO
    jobs = [job(options, entry, rate, options.seeds[0], keep) for entry, rate in cells]
    for (entry, rate), result in zip(cells, pool.run(phase, jobs, later), strict=True):
        entry.validation[rate] = choice_loss(result["validation"]) if result else None


def run_seeds(pool: Pool, options: Options, entries: list[Entry]) -> None:
    """All seeds at the chosen rate; a method that failed at every rate has none."""
    cells = [(entry, seed) for seed in options.seeds for entry in entries if entry.rate is not None]
    keep = Keep.YES if options.tune else Keep.NO
    jobs = [job(options, entry, entry.rate, seed, keep) for entry, seed in cells]
    for (entry, seed), result in zip(cells, pool.run("seeds", jobs, _tuning(options, entries)), strict=True):
        if result:
            entry.runs[seed] = result


def _tuning(options: Options, entries: list[Entry]) -> dict[str, int]:
    """How many fine-tunings will come."""
    return {"FineTune": len(entries) * len(options.seeds) * len(fine_tuning.TASKS)} if options.tune else {}


def _forget_others(pool: Pool, options: Options, entries: list[Entry]) -> None:
    """Delete the students at rates that were not chosen; what was measured of them stays."""
    for entry in entries:
        for rate in entry.validation:
            if rate != entry.rate:
                shutil.rmtree(job(options, entry, rate, options.seeds[0]).export(pool.work), ignore_errors=True)


QUICK_EXAMPLES = 64
"""Of each set that a probe takes, in a quick study."""
Source = Train | EvaluateTeacher
"""Whose checkpoint is measured further."""


def _probe(pool: Pool, options: Options, comparison: Comparison, teacher: EvaluateTeacher) -> None:
    cells: list[tuple[dict, Source]] = [(comparison.teacher_probes, teacher)]
    for entry in comparison.entries:
        cells += [(entry.probes, export) for export in exports(options, entry)]
    run_probes(pool, cells, QUICK_EXAMPLES if options.quick else None)


def exports(options: Options, entry: Entry) -> list[Train]:
    """The runs of all seeds that were trained, whose students are kept."""
    return [job(options, entry, entry.rate, seed, Keep.YES) for seed in entry.runs]


def run_probes(pool: Pool, cells: list[tuple[dict, Source]], limit: int | None) -> None:
    """Add the scores of every source's frozen features to its dict: probe -> scores."""
    jobs = [probing.Probe(source, limit) for _, source in cells]
    for (probes, _), result in zip(cells, pool.run("probes", jobs), strict=True):
        for name, score in (result["scores"] if result else {}).items():
            probes.setdefault(name, []).append(score)


def run_fine_tuning(pool: Pool, cells: list[tuple[dict, Source, str, int]], quick: bool) -> None:
    """Add the scores of (dict, source, task, seed) to each dict: task -> scores."""
    jobs = [fine_tuning.FineTune(source, task, seed, quick) for _, source, task, seed in cells]
    for (tasks, _, task, _), result in zip(cells, pool.run("fine-tuning", jobs), strict=True):
        if result:
            tasks.setdefault(task, []).append(result["score"])


def _fine_tune(pool: Pool, options: Options, comparison: Comparison, teacher: EvaluateTeacher) -> None:
    cells: list[tuple[dict, Source, str, int]] = []
    for entry in comparison.entries:
        for seed, export in zip(entry.runs, exports(options, entry), strict=True):
            cells += [(entry.tasks, export, task, seed) for task in fine_tuning.TASKS]
    cells += [(comparison.teacher_tasks, teacher, task, seed) for seed in options.seeds for task in fine_tuning.TASKS]
    run_fine_tuning(pool, cells, options.quick)
