"""The study `embedder`: sentence vectors of half of MiniLM-L6, ours against rivals, same sentences and steps.

Rates are chosen by the mean cosine to the teacher's vectors on the VALIDATION half, on the first seed; reported are
cosine and recall@10 on the TEST half, and STS-B by the vectors of the export.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.quality.comparison import QUICK_EXAMPLES, Entry, exports, run_probes, run_seeds, spec, try_rates
from experiments.quality.embedder_arms import EMBEDDER_ARMS, EMBEDDER_BASE
from experiments.quality.jobs import EvaluateTeacher
from experiments.quality.options import Options
from experiments.quality.pool import Pool


@dataclass
class EmbedderStudy:
    """All that the tables are made of."""

    entries: list[Entry]
    teacher_probes: dict[str, list[float]] = field(default_factory=dict)
    teacher_parameters: int | None = None


def run(pool: Pool, options: Options) -> EmbedderStudy:
    arms = [EMBEDDER_ARMS[name] for name in options.arms]
    study = EmbedderStudy([Entry(arm, "half", start=EMBEDDER_BASE) for arm in arms])
    try_rates(pool, options, study.entries)
    run_seeds(pool, options, study.entries)
    teacher = EvaluateTeacher(spec(options, study.entries[0], options.rates[0], options.seeds[0]), options.eval_blocks)
    study.teacher_parameters = (pool.run("teacher", [teacher])[0] or {}).get("parameters")
    sources = [(entry.probes, export) for entry in study.entries for export in exports(options, entry)]
    run_probes(pool, [(study.teacher_probes, teacher), *sources], QUICK_EXAMPLES if options.quick else None)
    return study
