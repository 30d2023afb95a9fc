"""The study `refit`: which form of the cut is best after distillation, and does longer training change the order?

Every form has its own learning rate at every length, chosen on the VALIDATION half with the first seed: at the
shortest length from three rates and one beyond the end of these; at longer ones from the best rate of the length
before, the next lower one and one beyond these. What the cut alone comes to is measured by the same events without
training. Short runs come first; what is not selected, or does not fit the budget, is taken from what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.quality.arms import UNTRAINED_RATE, Arm
from experiments.quality.availability import outlook
from experiments.quality.budget import Budget
from experiments.quality.comparison import Entry
from experiments.quality.fine_tuning import FineTune
from experiments.quality.jobs import Job, Keep, Train
from experiments.quality.options import LENGTHS, Options
from experiments.quality.pool import Pool
from experiments.quality.refit_arms import DECODER_RATE, REFERENCE, REFIT_ARMS, cut_alone, pace
from experiments.quality.specs import RunSpec
from experiments.quality.statistics import FACTOR, best_rate, choice_loss, extension
from experiments.quality.study_teacher import StudyTeacher, study_teacher

CUT_STEPS = 40
"""Steps that take as long as a run that only cuts, for the budget."""
TASK_STEPS = 150
"""Steps that take as long as a fine-tuning."""


@dataclass
class Cell(Entry):
    """One form of the cut at one width and length."""

    length: int = 1
    tuned: dict[int, dict] = field(default_factory=dict)
    """Seed -> {"test": task -> score of the fine-tuned export}, as what was measured of the run itself."""

    @property
    def label(self) -> str:
        return f"{self.arm.name}/{self.width}/x{self.length}"


Plan = tuple[Cell, list[Job]]
"""Runs that are made together or not at all."""


@dataclass
class RefitStudy:
    """All that the tables are made of."""

    cells: list[Cell]
    """Widths within lengths, both ascending in what they cost."""
    cut: dict[tuple[str, str], dict[int, dict]] = field(default_factory=dict)
    """(Arm, width) -> seed -> what the cut alone comes to."""
    refused: dict[str, str] = field(default_factory=dict)
    """Arm -> why the product does not run it."""
    left_out: list[str] = field(default_factory=list)
    """What was selected and is not there."""
    is_causal: bool = False

    def at(self, width: str, length: int) -> list[Cell]:
        return [cell for cell in self.cells if (cell.width, cell.length) == (width, length)]

    def same_form(self, cell: Cell) -> list[Cell]:
        """The cell's arm and width at every length, ascending."""
        return [each for each in self.cells if (each.arm, each.width) == (cell.arm, cell.width)]


def run(pool: Pool, options: Options) -> RefitStudy:
    teacher = study_teacher(options, pool.work)
    study = plan(options, teacher)
    runner = _Runner(pool, options, teacher, study)
    for length in LENGTHS:
        for width in options.widths:
            cells = study.at(width, length)
            if length == LENGTHS[0]:
                runner.cut(cells)
            runner.tune(cells)
            runner.seeds(cells)
            if length == LENGTHS[0]:
                runner.tasks(cells)
    return study


def plan(options: Options, teacher: StudyTeacher) -> RefitStudy:
    """All arms at all widths and lengths, but for arms that the product refuses."""
    study = RefitStudy([], is_causal=teacher.is_causal)
    arms = [_arm(name, teacher) for name in REFIT_ARMS]
    for width in options.widths:
        for arm in arms:
            cell = Cell(arm, width, start=teacher.at_width(width))
            spec = job(options, teacher, cell, arm.rate, options.seeds[0]).spec
            if refusal := outlook(spec, teacher.config).refusal:
                study.refused.setdefault(arm.name, refusal)
    study.cells = [
        Cell(arm, width, start=teacher.at_width(width), length=length)
        for length in LENGTHS
        for width in options.widths
        for arm in arms
        if arm.name not in study.refused
    ]
    return study


def _arm(name: str, teacher: StudyTeacher) -> Arm:
    arm = REFIT_ARMS[name]
    return dataclasses.replace(arm, rate=DECODER_RATE) if teacher.is_causal else arm


def job(options: Options, teacher: StudyTeacher, cell: Cell, rate: float, seed: int) -> Train:
    parts = (cell.overrides, pace(cell.arm, options.steps, cell.length), options.set)
    spec = RunSpec.of(cell.label, *parts, steps=options.steps * cell.length, lr=rate, seed=seed)
    return Train(spec, eval_blocks=teacher.eval_blocks)


def cut_job(options: Options, teacher: StudyTeacher, cell: Cell, seed: int) -> Train:
    """The arm's cut at the shortest length, without training."""
    steps, fields = cut_alone(cell.arm, options.steps)
    label = f"{cell.arm.name}/{cell.width}/cut"
    spec = RunSpec.of(label, cell.overrides, fields, options.set, steps=steps, lr=UNTRAINED_RATE, seed=seed)
    return Train(spec, eval_blocks=teacher.eval_blocks)


def rates(options: Options, study: RefitStudy, cell: Cell) -> tuple[float, ...]:
    """To try first, ascending. Where no shorter length has a rate, those of the shortest."""
    shorter = [each for each in study.same_form(cell) if each.length < cell.length]
    known = [each.rate for each in shorter if each.rate is not None]
    return (known[-1] / FACTOR, known[-1]) if known else options.grid(cell.arm, cell.width)


class _Runner:
    """Makes runs as far as they are selected and fit, and puts what they come to into the cells."""

    def __init__(self, pool: Pool, options: Options, teacher: StudyTeacher, study: RefitStudy) -> None:
        self._pool, self._options, self._teacher, self._study = pool, options, teacher, study
        self._budget = Budget(options.budget_minutes, options.workers)

    def cut(self, cells: list[Cell]) -> None:
        seeds = self._options.seeds
        plans = [(cell, [cut_job(self._options, self._teacher, cell, seed) for seed in seeds]) for cell in cells]
        for cell, results in self._results("cut alone", plans, is_cut=True):
            runs = {seed: result for seed, result in zip(seeds, results, strict=True) if result}
            self._study.cut[cell.arm.name, cell.width] = runs

    def tune(self, cells: list[Cell]) -> None:
        """The first rates, one beyond where the best is at an end, and the choice."""
        self._validate("rates", [(cell, rates(self._options, self._study, cell)) for cell in cells])
        further = [(cell, (rate,)) for cell in cells if (rate := extension(cell.validation)) is not None]
        self._validate("further rates", further)
        for cell, (rate,) in further:
            cell.extended = [rate] if rate in cell.validation else []  # else the time did not allow it
        for cell in cells:
            cell.rate = best_rate(cell.validation)

    def _validate(self, phase: str, wanted: list[tuple[Cell, Sequence[float]]]) -> None:
        tried = {cell.label: list(some) for cell, some in wanted}
        plans = [(cell, [self._job(cell, rate, self._options.seeds[0]) for rate in some]) for cell, some in wanted]
        for cell, results in self._results(phase, plans):
            for rate, result in zip(tried[cell.label], results, strict=True):
                cell.validation[rate] = choice_loss(result["validation"]) if result else None

    def seeds(self, cells: list[Cell]) -> None:
        """At the chosen rates: the reference first, then from the best to the worst of the first seed."""
        ready = [cell for cell in cells if cell.rate is not None]
        ready.sort(key=lambda cell: (cell.arm.name != REFERENCE, cell.validation[cell.rate]))
        for seed in self._options.seeds:
            plans = [(cell, [self._job(cell, cell.rate, seed)]) for cell in ready]
            for cell, (result,) in self._results(f"seed {seed}", plans):
                if result:
                    cell.runs[seed] = result

    def tasks(self, cells: list[Cell]) -> None:
        """Fine-tune the exports of all seeds, each with the seed of its run."""
        wanted = [(seed, task) for seed in self._options.seeds for task in self._options.tasks]
        plans = [
            (cell, [self._tuning(cell, seed, task) for seed, task in wanted if seed in cell.runs]) for cell in cells
        ]
        chosen = self._selected("fine-tuning", plans, TASK_STEPS)
        new = [job.of for _, jobs in chosen for job in jobs if job.result(self._pool.work) is None]
        self._pool.run("students to fine-tune", list(dict.fromkeys(new)))
        for cell, results in self._made("fine-tuning", chosen):
            for (seed, task), result in zip([w for w in wanted if w[0] in cell.runs], results, strict=True):
                if result:
                    cell.tuned.setdefault(seed, {"test": {}})["test"][task] = result["score"]

    def _tuning(self, cell: Cell, seed: int, task: str) -> FineTune:
        run = dataclasses.replace(self._job(cell, cell.rate, seed), keep=Keep.YES)
        return FineTune(run, task, seed, self._options.quick, self._options.task_rate)

    def _job(self, cell: Cell, rate: float, seed: int) -> Train:
        return job(self._options, self._teacher, cell, rate, seed)

    def _results(self, phase: str, plans: list[Plan], is_cut: bool = False) -> list[tuple[Cell, list[dict | None]]]:
        """Of the plans that are there or fit."""
        answers = self._made(phase, self._selected(phase, plans, CUT_STEPS if is_cut else None))
        for cell, some in answers if not is_cut else ():
            self._budget.saw(some, self._steps(cell))
        return answers

    def _selected(self, phase: str, plans: list[Plan], steps: int | None = None) -> list[Plan]:
        """The plans that are there, and those that are selected and fit.

        Args:
            steps: of training that take as long as a job of the plans; None: they are trained runs of a length that has
                to be selected.
        """
        chosen: list[Plan] = []
        missing = 0
        for cell, jobs in plans:
            new = sum(job.result(self._pool.work) is None for job in jobs)
            is_selected = cell.arm.name in self._options.arms and (steps or cell.length in self._options.lengths)
            if not new or (is_selected and self._budget.allows(missing + new, steps or self._steps(cell))):
                missing += new
                chosen.append((cell, jobs))
            elif is_selected:
                self._study.left_out.append(f"{cell.label}: {phase}")
        return chosen

    def _made(self, phase: str, chosen: list[Plan]) -> list[tuple[Cell, list[dict | None]]]:
        jobs = [job for _, some in chosen for job in some]
        results = iter(self._pool.run(phase, jobs)) if jobs else iter(())
        return [(cell, [next(results) for _ in some]) for cell, some in chosen]

    def _steps(self, cell: Cell) -> int:
        return self._options.steps * cell.length
