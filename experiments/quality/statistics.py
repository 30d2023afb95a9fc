"""Choosing a learning rate, means over seeds, and what counts as better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.table import Mean, cell
from homodistil.training.heldout_scores import language_loss

FACTOR = 2.0
"""By which a grid of rates is extended where its best is at an end."""


class Verdict(NamedTuple):
    """Is ours better than a rival?"""

    difference: float
    """Ours - rival."""
    deviation: float
    """Of the difference: sqrt(sd_ours^2 + sd_rival^2)."""
    is_better: bool
    """By more than two deviations, in the direction that counts."""


Runs = Mapping[int, dict]
"""Seed -> what was measured of a run."""


def spread(values: Sequence[float]) -> Mean | None:
    """Mean and deviation over seeds; None where there is no value."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), sd, len(values))


def over_seeds(runs: Runs, metric: str) -> Mean | None:
    """Of a metric on the TEST half."""
    return spread([run["test"][metric] for run in runs.values()])


def paired(values: Sequence[float], base: Sequence[float]) -> Mean | None:
    """Of the differences to `base`, seed by seed."""
    return spread([value - other for value, other in zip(values, base, strict=True)])


def difference(runs: Runs, base: Runs, metric: str) -> Mean | None:
    """Paired, over the seeds that both have; None where there is none, and for the base itself."""
    common = [seed for seed in runs if seed in base and runs is not base]
    return paired(*([side[seed]["test"][metric] for seed in common] for side in (runs, base)))


def marked(change: Mean | None, form: str = "{:+.3f}") -> str:
    """A cell; with a star where the difference is more than twice its deviation."""
    mark = " *" if change is not None and abs(change.mean) > 2 * change.sd else ""
    return cell(change, form) + mark


def verdict(ours: Mean, rival: Mean, lower_is_better: bool) -> Verdict:
    """Where a deviation is not known (one seed), nothing is better."""
    difference, deviation = ours.mean - rival.mean, math.hypot(ours.sd, rival.sd)
    gain = -difference if lower_is_better else difference
    return Verdict(difference, deviation, gain > 2 * deviation)


def choice_loss(measured: Mapping[str, float]) -> float:
    """What learning rates are chosen by, of held-out results: the cross-entropy of the task (nats); 1 - mean cosine to
    the teacher's vectors, where texts have these instead of words to predict."""
    return 1 - measured["vector_cosine"] if "vector_cosine" in measured else language_loss(dict(measured))


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest validation loss; None among `losses` is a run that failed. None: all failed."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def extension(losses: Mapping[float, float | None]) -> float | None:
    """The one rate to try in addition, where the best is the lowest or the highest; None where it is inside."""
    best = best_rate(losses)
    if best is None:
        return None
    if best == max(losses):
        return best * FACTOR
    return best / FACTOR if best == min(losses) else None
