"""The phases of the experiment in the order of their worth: what the time does not allow is left out, and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PretrainedConfig

from experiments.gpu_quality.arms import BASE, ONLY_FIRST, PEER, REACHED, SAME_RATE, TUNED, WIDTHS, arms
from experiments.gpu_quality.sizes import Sizes
from experiments.quality import tokens_saved
from experiments.quality.budget import Budget
from experiments.quality.comparison import Entry, exports, job, run_fine_tuning, run_probes, run_seeds, spec, try_rates
from experiments.quality.jobs import EvaluateTeacher, Train
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.specs import Shape
from experiments.quality.tokens_saved import LENGTHS, Reach

TRAINING_SHARE = 0.85
"""Of the time; the rest is for probes and fine-tuning."""
TASK = "stsb"
"""What exports are fine-tuned on."""


@dataclass
class Findings:
    """All that the tables are made of; entries fill up phase by phase."""

    entries: list[Entry]
    teacher: dict = field(default_factory=dict)
    """What `Context.evaluate_teacher` gives."""
    teacher_probes: dict[str, list[float]] = field(default_factory=dict)
    saved: list[Reach] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Phases that the time did not allow."""

    def entry(self, arm: str, width: str) -> Entry:
        return next(entry for entry in self.entries if (entry.arm.name, entry.width) == (arm, width))


class Phase(NamedTuple):
    title: str
    jobs: Callable[[], list[Train]]
    """The runs that it is made of, once the phases before it are done."""
    run: Callable[[], None]


def findings_of(options: Options, sizes: Sizes, source: tuple[str, ...], teacher: PretrainedConfig) -> Findings:
    """The experiment with nothing measured yet.

    Args:
        source: overrides that name teacher and text.
        teacher: its configuration.
    """
    made = arms(sizes.steps)
    entries = [
        Entry(made[name], width, start=(*BASE, *source, *sizes.overrides, *shape(teacher, width).overrides))
        for width in options.widths
        for name in options.arms
        if width == options.widths[0] or name not in ONLY_FIRST
    ]
    return Findings(entries)


def shape(teacher: PretrainedConfig, width: str) -> Shape:
    """The teacher's, with hidden size and neurons divided; as many heads as before, or as many as divide the rest."""
    hidden_size, heads = teacher.hidden_size // WIDTHS[width], teacher.num_attention_heads
    while hidden_size % heads:
        heads -= 1
    return Shape(hidden_size, teacher.intermediate_size // WIDTHS[width], heads)


class Experiment:
    """Carries out phase after phase on a pool.

    Args:
        pool: None, where phases are only listed.
        publish: called with the findings after every phase.
    """

    def __init__(
        self, pool: Pool | None, options: Options, sizes: Sizes, findings: Findings, publish: Callable[[Findings], None]
    ) -> None:
        self.pool, self.options, self.sizes, self.findings, self._publish = pool, options, sizes, findings, publish
        minutes = options.budget_minutes
        self._budget = Budget(None if minutes is None else TRAINING_SHARE * minutes, options.workers)
        self._first, self._others = options.widths[0], options.widths[1:]
        self.teacher = EvaluateTeacher(
            spec(options, findings.entries[0], options.rates[0], options.seeds[0]), options.eval_blocks
        )

    def run(self) -> None:
        for phase in self.phases():
            waiting = [one for one in phase.jobs() if one.result(self.pool.work) is None]
            if not waiting or self._budget.allows(1, sum(map(_steps, waiting))):
                phase.run()
                for one in waiting:
                    self._budget.saw([one.result(self.pool.work)], _steps(one))
            else:
                self.findings.left_out.append(phase.title)
            self._publish(self.findings)

    def phases(self) -> list[Phase]:
        seed, *further = self.options.seeds
        listed = ", ".join(map(str, further))
        at_first, at_others = self._at(self._first), [e for width in self._others for e in self._at(width)]
        several = [entry for entry in at_first if entry.arm.name not in ONLY_FIRST]
        return [
            Phase("the teacher", list, self._teacher),
            Phase("learning rates", self._rate_jobs, self._rates),
            self._trained(f"{self._first} width, seed {seed}", at_first, (seed,)),
            Phase(f"tokens that {PEER} needs to reach {REACHED}", self._longer_jobs, self._longer),
            self._trained(f"{', '.join(self._others)} width, seed {seed}", at_others, (seed,)),
            *([self._trained(f"{self._first} width, seeds {listed}", several, tuple(further))] if further else []),
            Phase("probes of frozen features", list, self._probes),
            Phase("fine-tuning on STS-B", list, self._fine_tuning),
        ]

    def _at(self, width: str) -> list[Entry]:
        return [entry for entry in self.findings.entries if entry.width == width]

    # -- phases

    def _teacher(self) -> None:
        """Corrected and evaluated; how fast that was is the first that is known of this machine."""
        self.findings.teacher = self.pool.run("teacher", [self.teacher])[0] or {}
        self._budget.saw([self.findings.teacher], self.sizes.correction_steps)

    @property
    def _short(self) -> Options:
        return dataclasses.replace(self.options, steps=self.sizes.rate_steps, tune=False)

    def _rated(self) -> list[Entry]:
        return [entry for entry in self._at(self._first) if entry.arm.name not in SAME_RATE]

    def _rate_jobs(self) -> list[Train]:
        short, seed = self._short, self.options.seeds[0]
        return [job(short, entry, rate, seed) for entry in self._rated() for rate in short.rates]

    def _rates(self) -> None:
        """Short runs at the first width choose; other widths and arms that share a rate follow."""
        try_rates(self.pool, self._short, self._rated(), extensions=0)
        chosen = {entry.arm.name: entry.rate for entry in self._rated()}
        for entry in self.findings.entries:
            entry.rate = chosen.get(SAME_RATE.get(entry.arm.name, entry.arm.name))

    def _trained(self, title: str, entries: list[Entry], seeds: tuple[int, ...]) -> Phase:
        def jobs() -> list[Train]:
            return [job(self.options, e, e.rate, seed) for seed in seeds for e in entries if e.rate is not None]

        return Phase(title, jobs, lambda: run_seeds(self.pool, dataclasses.replace(self.options, seeds=seeds), entries))

    def _longer_jobs(self) -> list[Train]:
        peer, seed = self.findings.entry(PEER, self._first), self.options.seeds[0]
        if peer.rate is None:
            return []
        return [job(self.options, peer, peer.rate, seed, length=length) for length in LENGTHS]

    def _longer(self) -> None:
        peer, reached = (self.findings.entry(arm, self._first) for arm in (PEER, REACHED))
        self.findings.saved = tokens_saved.run(self.pool, self.options, [peer], reached)

    def _probes(self) -> None:
        cells = [(self.findings.teacher_probes, self.teacher)]
        for entry in self.findings.entries:
            cells += [(entry.probes, export) for export in exports(self.options, entry)]
        run_probes(self.pool, cells, self.sizes.probe_examples)

    def _fine_tuning(self) -> None:
        cells = []
        for entry in (self.findings.entry(arm, self._first) for arm in TUNED):
            of_seed = zip(entry.runs, exports(self.options, entry), strict=True)
            cells += [(entry.tasks, export, TASK, seed) for seed, export in of_seed]
        run_fine_tuning(self.pool, cells, self.options.quick)


def _steps(job_of_run: Train) -> int:
    return job_of_run.spec.config().train.steps
