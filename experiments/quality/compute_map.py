"""The study `map`: where gradual pruning beats one-shot: target size x number of steps.

In every cell each form has its own best rate, and gradual its own best end of pruning (VALIDATION half, first seed);
then further seeds. One-shot is compared twice: with equal steps, and with as many further steps as the gradual run's
compute would have paid for, by CPU seconds or FLOPs, whichever gives one-shot more.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from experiments.quality.arms import BASE, ONE_SHOT, SHAPES
from experiments.quality.budget import Budget
from experiments.quality.jobs import Train
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.specs import RunSpec
from experiments.quality.statistics import best_rate, extension

FACTORS = (1, 4, 16)
"""Lengths of training, times the shortest."""
ENDS = (0.1, 0.3)
"""Of gradual pruning, as a share of the steps."""
EVENTS = 9
"""About so many: intervals follow the length, so that a cell differs from another in one thing."""
MORE = 0.05
"""The number of one-shot's steps at equal compute is rounded to this share of the equal steps."""


@dataclass
class Form:
    """Gradual or one-shot, in one cell, at its best settings."""

    validation: dict[str, dict[float, float | None]] = field(default_factory=dict)
    """Variant -> rate -> MLM loss of the first seed."""
    variant: str | None = None
    rate: float | None = None
    runs: dict[int, dict] = field(default_factory=dict)
    """Seed -> measured."""


@dataclass
class Cell:
    width: str
    steps: int
    gradual: Form = field(default_factory=Form)
    one_shot: Form = field(default_factory=Form)
    longer_steps: int | None = None
    """Of one-shot at equal compute."""
    longer: dict[int, dict] = field(default_factory=dict)
    """Seed -> one-shot at equal compute, at the rate of equal steps."""

    @property
    def label(self) -> str:
        return f"{self.width}, {self.steps} steps"


@dataclass
class Map:
    cells: list[Cell]
    left_out: list[str] = field(default_factory=list)
    """What the budget did not allow."""


def run(pool: Pool, options: Options) -> Map:
    factors = FACTORS[:1] if options.quick else FACTORS
    cells = [Cell(width, options.steps * factor) for factor in factors for width in options.widths]  # cheap ones first
    study, budget = Map(cells), Budget(options.budget_minutes, options.workers)
    for cell in list(cells):
        needed = (len(ENDS) + 1) * (len(options.rates) + 1)
        if not budget.allows(needed, cell.steps):
            study.left_out.append(f"{cell.label}: all of it")
            cells.remove(cell)
            continue
        _tune(pool, options, cell, budget)
    for cell in cells:
        _all_seeds(pool, options, cell, budget, study)
    return study


def _tune(pool: Pool, options: Options, cell: Cell, budget: Budget) -> None:
    """Best rate of every variant, then the best variant of each form."""
    for form, variants in ((cell.gradual, _ends(cell.steps)), (cell.one_shot, {"one-shot": ONE_SHOT})):
        form.validation = {name: {} for name in variants}
    wanted = [(name, rate) for name in _variants(cell) for rate in options.rates]
    _validate(pool, options, cell, wanted, budget)
    losses = cell.gradual.validation | cell.one_shot.validation
    further = [(name, extension(rates)) for name, rates in losses.items()]
    _validate(pool, options, cell, [(name, rate) for name, rate in further if rate is not None], budget)
    for form in (cell.gradual, cell.one_shot):
        best = {name: (best_rate(rates), rates) for name, rates in form.validation.items()}
        best = {name: (rate, rates[rate]) for name, (rate, rates) in best.items() if rate is not None}
        if best:
            form.variant = min(best, key=lambda name: best[name][1])
            form.rate = best[form.variant][0]


def _ends(steps: int) -> dict[str, tuple[str, ...]]:
    fields_of = {}
    for end in ENDS:
        interval = max(1, round(end * steps / EVENTS))
        fields_of[f"t_f = {end:g}"] = (
            f"pruning.end_fraction={end:g}",
            f"pruning.interval_steps={interval}",
            "pruning.max_event_fraction=0.5",
        )
    return fields_of


def _variants(cell: Cell) -> dict[str, tuple[str, ...]]:
    return {**_ends(cell.steps), "one-shot": ONE_SHOT}


def job(options: Options, cell: Cell, variant: str, rate: float, seed: int, steps: int | None = None) -> Train:
    parts = (BASE, SHAPES[cell.width].overrides, _variants(cell)[variant], options.set)
    spec = RunSpec.of(f"{variant}/{cell.label}", *parts, steps=steps or cell.steps, lr=rate, seed=seed)
    return Train(spec, eval_blocks=options.eval_blocks)


def _validate(pool: Pool, options: Options, cell: Cell, wanted: list[tuple[str, float]], budget: Budget) -> None:
    jobs = [job(options, cell, name, rate, options.seeds[0]) for name, rate in wanted]
    results = pool.run(f"rates, {cell.label}", jobs)
    budget.saw(results, cell.steps)
    losses = cell.gradual.validation | cell.one_shot.validation
    for (name, rate), result in zip(wanted, results, strict=True):
        losses[name][rate] = result["validation"]["mlm_loss"] if result else None


def _all_seeds(pool: Pool, options: Options, cell: Cell, budget: Budget, study: Map) -> None:
    if cell.gradual.rate is None or cell.one_shot.rate is None:
        return
    seeds = options.seeds if budget.allows(4 * (len(options.seeds) - 1), cell.steps) else options.seeds[:1]
    if len(seeds) < len(options.seeds):
        study.left_out.append(f"{cell.label}: seeds beyond {seeds[0]}")
    for form in (cell.gradual, cell.one_shot):
        jobs = [job(options, cell, form.variant, form.rate, seed) for seed in seeds]
        results = pool.run(f"seeds, {cell.label}", jobs)
        form.runs = {seed: run for seed, run in zip(seeds, results, strict=True) if run}
    if not (cell.gradual.runs and cell.one_shot.runs):
        return
    cell.longer_steps = longer_steps(cell.steps, compute_ratio(cell))
    if not budget.allows(len(seeds), cell.longer_steps):
        study.left_out.append(f"{cell.label}: one-shot at equal compute")
        cell.longer_steps = None
        return
    jobs = [job(options, cell, "one-shot", cell.one_shot.rate, seed, cell.longer_steps) for seed in seeds]
    results = pool.run(f"equal compute, {cell.label}", jobs)
    cell.longer = {seed: run for seed, run in zip(seeds, results, strict=True) if run}


def compute_ratio(cell: Cell) -> float:
    """What gradual costs, times one-shot: by CPU seconds or by FLOPs, whichever is more; at least 1."""
    ratios = (
        statistics.fmean(run[cost] for run in cell.gradual.runs.values())
        / statistics.fmean(run[cost] for run in cell.one_shot.runs.values())
        for cost in ("cpu_s", "flops")
    )
    return max(1.0, *ratios)


def longer_steps(steps: int, ratio: float) -> int:
    """Steps that one-shot may have, rounded up to a multiple of MORE x steps."""
    unit = max(1, round(MORE * steps))
    return math.ceil(round(steps * ratio / unit, 6)) * unit
