"""Tries one real training step on every rank with student, teacher and engine of the run, and then the first cut."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager

from homodistil.metrics.recorder import memory_bytes
from homodistil.preflight.findings import Findings
from homodistil.training.trainer import Trainer


def try_step(findings: Findings, trial: AbstractContextManager[Trainer]) -> None:
    """Train one step, make the first cut, and note time and memory in `findings`. Every rank calls it.

    Args:
        trial: gives the trainer (training/short_runs.py); what it takes to build it is part of the time.
    """
    start_s = time.perf_counter()
    with trial as trainer:
        trainer.train_step()
        cut = _first_cut(trainer)
    peak = max(value for name, value in memory_bytes().items())
    seconds = time.perf_counter() - start_s
    findings.note("step", f"forward, backward, step{cut}; {peak / 1e9:.2f} GB in use, {seconds:.1f} s")


def _first_cut(trainer: Trainer) -> str:
    """Apply the first event of the schedule now. Returns its text for the row; "" if the schedule has no event."""
    student, table = trainer.student, trainer.shrinker.pruner.schedule.table
    widths = {axis: width for axis, width in table.get(min(table, default=0), {}).items()}
    due = {axis: width for axis, width in widths.items() if width < student.widths[axis]}
    if not due:
        return ""
    at_event = dataclasses.replace(trainer.state, step=min(table))
    trainer.resize(trainer.shrinker.due(trainer.live, trainer.prefetcher, at_event))
    return f", cut to hidden {student.widths['hidden']}"
